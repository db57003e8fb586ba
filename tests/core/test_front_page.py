"""The front page of core: its example runs, and its reading path leads somewhere."""

import doctest
import re

import sa_inject.core
from tests.conftest import ROOT


def test_the_example_runs():
    result = doctest.testmod(sa_inject.core)
    assert result.failed == 0 and result.attempted > 10


def test_the_reading_path_names_files_that_exist_and_takes_ten_minutes():
    page = sa_inject.core.__doc__ or ""
    path = page[page.index("Ten minutes of reading") :]
    files = re.findall(r"\w+/\w+\.py", path)
    assert len(files) > 8 and [file for file in files if not (ROOT / file).is_file()] == []
    assert sum(int(minutes) for minutes in re.findall(r"(\d+) min", path)) == 10


def test_the_terms_name_files_of_core():
    page = sa_inject.core.__doc__ or ""
    terms = page[page.index("Six terms") : page.index("The whole method")]
    files = re.findall(r"(\w+\.py)", terms)
    assert len(files) >= 6 and [file for file in files if not (ROOT / "core" / file).is_file()] == []
