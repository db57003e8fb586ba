"""What the pages promise: their size, their links, the tests that they name, and the list of messages."""

import re
from pathlib import Path

import pytest

from sa_inject.docs import messages  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "bench/*.md", "demo/*.md", "web/docs/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
TEST_NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", text_of(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    text = text_of("README.md")
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= 900
    assert len(text.splitlines()) <= 150


def test_readme_names_the_two_commands():
    assert all(f"`python dev.py {name}`" in text_of("README.md") for name in ("demo", "test"))


def test_readme_links_every_node_to_its_help():
    text = text_of("README.md")
    for page in (ROOT / "web" / "docs").glob("*.md"):
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert f"[{title}](web/docs/{page.name})" in text


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(text_of(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.relative_to(ROOT).as_posix()), anchor


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page):
    for path, name in TEST_NAME.findall(text_of(page)):
        assert re.search(rf"(?m)^def {name}\(", text_of(path)), f"{path}::{name}"


def rows_of_table_below(heading: str, page: str) -> dict[str, str]:
    """First cell: whole row."""
    below = text_of(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in below.splitlines() if line.startswith("|")]
    return {row.split("|")[1].strip(): row for row in rows[2:]}


def test_every_promise_of_the_readme_names_its_tests():
    promised = rows_of_table_below("Works with", "README.md")
    tested = rows_of_table_below("What the README promises", "CONTRIBUTING.md")
    assert len(promised) > 5
    assert promised.keys() == tested.keys()
    assert all(TEST_NAME.search(row) for row in tested.values())


def test_troubleshooting_lists_every_message():
    page = messages.PAGE.read_text(encoding="utf-8")
    assert page == messages.with_table(page), "run: python dev.py docs"
    assert len(messages.messages()) > 50


def test_messages_are_found_where_they_are_raised():
    source = """
CURE = "Save it as a PNG file."

def refuse(name):
    advice = f"The file {name} cannot be read. {CURE}"
    if name:
        raise ValueError(advice)
    raise TypeError("The name of the file is " + ("missing." if name else f"not {name}."))

class Node:
    def run(self):
        raise ValueError(text_for(self))

def text_for(node):
    return f"The node {node.number}{node.name} has no pictures."

def internal(self):
    raise AttributeError("this sentence is for no user of ours")
"""
    assert sorted(messages.raised_in(source)) == [
        "The file … cannot be read. Save it as a PNG file.",
        "The name of the file is missing.",
        "The name of the file is not ….",
        "The node … has no pictures.",
    ]
