"""Every language says the same things: the same keys, the same values in braces, and nothing left in English."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"
LANGUAGES = ("en", "zh", "ja")
FILES = ("main.json", "nodeDefs.json", "settings.json", "commands.json")
SCRIPTS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]"}
SAYS = re.compile(r"""say\(\s*["'`]([\w.]+)["'`]""")
SAYS_ONE_OF = re.compile(r"say\(\s*`(\w+)\.\$\{")
BUTTON = re.compile(r"""button\("([\w.]+)", "([\w.]+)\"""")


def load(language: str, name: str) -> dict:
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_every_language_has_the_same_keys_and_braces(language, name):
    english, other = dict(leaves(load("en", name))), dict(leaves(load(language, name)))
    assert other.keys() == english.keys()
    for path, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", other[path])) == sorted(re.findall(r"\{\w+\}", text)), path
        assert other[path].strip(), path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_sentences_are_translated(language, name):
    for path, text in leaves(load(language, name)):
        if path[-1] in ("tooltip", "description") or (name == "main.json" and len(text.split()) > 3):
            assert re.search(SCRIPTS[language], text), f"{path}: {text}"


def test_there_is_no_other_language_and_no_other_file():
    assert {path.name for path in LOCALES.iterdir()} == set(LANGUAGES)
    for language in LANGUAGES:
        assert {path.name for path in (LOCALES / language).iterdir()} == set(FILES)


def test_what_the_scripts_say_is_in_the_table_and_nothing_else_is():
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "web").rglob("*.*js"))
    texts = {".".join(path) for path, _ in leaves(load("en", "main.json")["saInject"])}
    said = set(SAYS.findall(scripts)) | {key for pair in BUTTON.findall(scripts) for key in pair}
    assert said <= texts, said - texts
    groups = set(SAYS_ONE_OF.findall(scripts))
    unused = {key for key in texts - said if key.split(".")[0] not in groups}
    assert unused == set()


def test_options_of_combos_are_not_translated_away():
    """A tooltip explains options by the names that the node shows."""
    english = load("en", "nodeDefs.json")
    for language in LANGUAGES[1:]:
        other = load(language, "nodeDefs.json")
        for node, name in (("EncodeImagePrompt", "fit"), ("TrainSAInjectAdapter", "precision")):
            options = re.findall(r"\b(\w+):", english[node]["inputs"][name]["tooltip"])
            assert options and all(option in other[node]["inputs"][name]["tooltip"] for option in options)
