"""Find words in a prompt, in any spelling, but not inside other words or file names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

# Scripts without spaces between words: a letter next to the word is not part of it.
SCRIPTS_WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR"}
DIGIT = "DIGIT"

JOINERS = "\u00ad\u200d\u2060\ufeff"  # soft hyphen and others: invisible, inside one word
INVISIBLE = set(JOINERS + "\u200b\u200c") | {chr(code) for code in range(0xFE00, 0xFE10)}  # and variation selectors
SECOND_HALVES = re.compile("[\u1160-\u11ff\uff9e\uff9f]")  # second parts of Korean syllables and of kana

# The host ends a name at white space and unescaped parentheses, newer ones also at [ and <. Users end it at a comma.
_IN_NAME = r"(?:\\[()]|[^\s()])"
_NAME = re.compile(rf"embedding:\s*{_IN_NAME}(?:(?![,\[<，、。；！？（）【】「」]){_IN_NAME})*", re.IGNORECASE)
_WHOLE_NAME = re.compile(rf"embedding:\s*({_IN_NAME}+)", re.IGNORECASE)
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)  # other packs remove it from the prompt
_WEIGHT = re.compile(r":[-+.\w]*$")


class Found(NamedTuple):
    """A word in a text, spelled `text[start:end]`."""

    start: int
    end: int
    word: str


def find_words(
    text: str, words: Iterable[str], is_embedding: Callable[[str], bool] = lambda name: False
) -> list[Found]:
    """Find words in a text, in any case, width and Unicode form. If two begin at one index, the longer one is found.

    is_embedding: whether an embedding file has exactly this name. It is called only for names with a comma or a
    bracket before a word.
    """
    names = [found.span() for pattern in (_NAME, _TAG) for found in pattern.finditer(text)]
    whole_names = [(*found.span(), found[1]) for found in _WHOLE_NAME.finditer(text)]

    def is_in_name(start: int, end: int) -> bool:
        if any(start < last and first < end for first, last in names):
            return True
        around = [name for first, last, name in whole_names if first < start < last]
        return any(is_embedding(re.sub(r"\\([()])", r"\1", _WEIGHT.sub("", name)).strip(",")) for name in around)

    return [found for found in _occurrences(text, words) if not is_in_name(found.start, found.end)]


def hidden_words(text: str, words: Iterable[str], found: Sequence[Found]) -> list[str]:
    """Words that were not found although their letters are in the text, outside of file names."""
    missing = [word for word in words if word not in {one.word for one in found}]
    if not missing:
        return []
    taken = [one[:2] for one in found] + [m.span() for pattern in (_NAME, _TAG) for m in pattern.finditer(text)]
    rest = list(text)
    for start, end in taken:
        rest[start:end] = "\n" * (end - start)
    letters = folded("".join(rest))
    return [word for word in missing if folded(word) in letters]


def folded(text: str) -> str:
    """The form in which texts are compared: no case, width, invisible letters; one form of accents; dotless i as i."""
    return "".join(_folded(cluster) for _, cluster in _clusters(text))


def _occurrences(text: str, words: Iterable[str]) -> list[Found]:
    spellings = sorted(((folded(word), word) for word in words), key=lambda spelling: -len(spelling[0]))
    clusters = _clusters(text)
    pieces = [_folded(cluster) for _, cluster in clusters]
    ends: dict[int, int] = {}  # index in the folded text: the cluster that ends there
    starts: list[int] = []  # for each cluster: its start in the folded text
    length = 0
    for number, piece in enumerate(pieces):
        starts.append(length)
        length += len(piece)
        if piece:
            ends[length] = number
    letters = "".join(pieces)

    found: list[Found] = []
    for first, piece in enumerate(pieces):
        if not piece or (found and clusters[first][0] < found[-1].end):
            continue
        for spelling, word in spellings:
            last = ends.get(starts[first] + len(spelling))
            if last is None or not letters.startswith(spelling, starts[first]):
                continue
            if _is_one_word(clusters, first, -1) or _is_one_word(clusters, last, 1):
                continue
            start, cluster = clusters[last]
            found.append(Found(clusters[first][0], start + len(cluster), word))
            break
    return found


def _is_one_word(clusters: Sequence[tuple[int, str]], edge: int, step: int) -> bool:
    """Whether the next cluster, before or after, is part of the same word."""
    beside = edge + step
    while 0 <= beside < len(clusters) and clusters[beside][1] in JOINERS:
        beside += step
    if not 0 <= beside < len(clusters):
        return False
    kinds = _kind(clusters[edge][1]), _kind(clusters[beside][1])
    return None not in kinds and (kinds[0] == kinds[1] or DIGIT in kinds)


def _kind(cluster: str) -> str | None:
    """DIGIT, or the script of a letter, such as LATIN. None for characters that separate words."""
    character = unicodedata.normalize("NFKC", cluster)[0]
    category = unicodedata.category(character)
    if category == "Nd":
        return DIGIT
    if category not in ("Lu", "Ll", "Lt", "Lo"):
        return None
    script = unicodedata.name(character, "").partition(" ")[0]
    return None if script in SCRIPTS_WITHOUT_SPACES else script


def _clusters(text: str) -> list[tuple[int, str]]:
    """Characters with their accents and other marks, and their indices."""
    firsts = [at for at, c in enumerate(text) if not at or not _belongs_to_the_one_before(c)]
    return [(start, text[start:end]) for start, end in pairwise([*firsts, len(text)])]


def _belongs_to_the_one_before(character: str) -> bool:
    if character.isascii():
        return False
    return unicodedata.category(character).startswith("M") or bool(SECOND_HALVES.match(character))


def _folded(cluster: str) -> str:
    if cluster.isascii():
        return cluster.lower()
    visible = "".join(c for c in cluster if c not in INVISIBLE)
    return unicodedata.normalize("NFKC", visible).casefold().replace("i\u0307", "i").replace("ı", "i")
