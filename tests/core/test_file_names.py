"""Names that are valid on Linux, macOS and Windows."""

import pytest

from sa_inject.core.file_names import name_problem

POSSIBLE = (
    "robot",
    "v1.5 näme",
    "机器人",
    ".hidden",
    "~",
    "console",
    "COM",
    "COM10",
    "nul_",
    "a'b",
    "x" * 200,
    "a (1)",
)
IMPOSSIBLE = {
    "Windows does not allow": ["robot?", "a|b", "a*b", "<a", "a>", 'a"b', "a:b", "a\nb", "a\tb", "a\0b", "a\x7fb"],
    "ends with a dot or a blank": ["robot.", "robot ", "robot. .", "..."],
    "name of a device": ["CON", "con", "NUL.v1", "aux.tar.gz", "Com1", "LPT9", "com²", "CONIN$", "prn .x"],
    "200 are possible": ["x" * 201, "机" * 67],
    "half of a character": ["a\ud800"],
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_possible_name(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize("words, name", [(words, name) for words, names in IMPOSSIBLE.items() for name in names])
def test_impossible_name(words: str, name: str) -> None:
    assert words in (name_problem(name) or "")
