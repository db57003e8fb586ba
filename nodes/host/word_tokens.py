"""Put the vectors of a token embedding among the tokens of one text encoder.

In the text, a marker replaces the word. CLIP's tokenizers read it as their own `embedding:` syntax. With language
models that syntax would lose the line breaks of their templates: there vectors replace the marker's token ids.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .host_types import Tokenizer

MARKER = "sa-inject-token-"  # followed by a number, so that several adapters can share one CLIP
MARKED = re.compile(rf" embedding:{MARKER}(\d+) ")
ORDINARY = "dog"  # a word of every vocabulary
SIGN = "\ue000"  # around a marker in a text for a language model: of Unicode's private use


def marked(number: int) -> str:
    """The marker of a word in the text for a tokenizer."""
    return f" embedding:{MARKER}{number} "


def with_vectors(inner: Tokenizer, vectors: Mapping[int, Tensor]) -> Tokenizer:
    """A copy of one encoder's tokenizer that replaces markers by vectors (n, width)."""
    return _by_embedding_syntax(inner, vectors) if is_clip(inner) else _by_token_ids(inner, vectors)


def is_clip(inner: Tokenizer) -> bool:
    return str(inner.embedding_key).startswith("clip_")


def word_ids(inner: Tokenizer, word: str) -> list[int]:
    """The token ids of a word inside a text."""
    return token_ids(inner, word if is_clip(inner) or not word else f" {word}")


def token_ids(inner: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, without start and end tokens."""
    ids = inner.tokenizer(text)["input_ids"][inner.tokens_start :]
    return ids[:-1] if inner.tokenizer_adds_end_token else ids


def _by_embedding_syntax(inner: Tokenizer, vectors: Mapping[int, Tensor]) -> Tokenizer:
    original = copy.copy(inner)
    if original.embedding_directory is None:
        original.embedding_directory = []  # None would disable the `embedding:` syntax
    patched, without_files = copy.copy(original), copy.copy(original)
    without_files.embedding_directory = []
    original_lookup = getattr(inner, "_sa_inject_original", original._try_get_embedding)
    names = {f"{MARKER}{number}": vector for number, vector in vectors.items()}

    def try_get_embedding(name: str) -> tuple:
        mark = name.split()[0] if name.split() else ""
        if mark not in names:
            return original_lookup(name)
        # The host's result for a name without a file, without searching the folders.
        return (names[mark], *type(inner)._try_get_embedding(without_files, name)[1:])

    patched._try_get_embedding = try_get_embedding
    patched._sa_inject_original = original_lookup
    return patched


def _by_token_ids(inner: Tokenizer, vectors: Mapping[int, Tensor]) -> Tokenizer:
    original = getattr(inner, "_sa_inject_original", inner)
    patched = copy.copy(original)
    patched.tokenizer = WordVocabulary(original, vectors)
    read = patched.tokenize_with_weights

    def signed(marker: re.Match) -> str:
        return f"{SIGN}{marker[1]}{SIGN}" if int(marker[1]) in vectors else marker[0]

    def tokenize_with_weights(text: str, *args: Any, **kwargs: Any) -> dict[str, list]:
        return read(MARKED.sub(signed, text), *args, **kwargs)

    patched.tokenize_with_weights = tokenize_with_weights
    patched._sa_inject_original = original
    return patched


class WordVocabulary:
    """The tokenizer of a language model, with vectors in place of marked words.

    The host accepts vectors among the token ids, as for an embedding file.
    """

    def __init__(self, inner: Tokenizer, vectors: Mapping[int, Tensor]) -> None:
        self._inner = inner
        self._vectors = vectors
        self._signed = re.compile(rf"{SIGN}({'|'.join(map(str, vectors))}){SIGN}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)  # during copying there are no attributes yet
        return getattr(self._inner.tokenizer, name)

    def __call__(self, text: str, *args: Any, **kwargs: Any) -> dict[str, list]:
        pieces = self._signed.split(text)  # texts, and at every second index the number of a word
        if len(pieces) == 1:
            return self._inner.tokenizer(text, *args, **kwargs)
        ids: list[int | Tensor] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids += list(self._vectors[int(piece)])
            else:
                # A space before a word is part of its first token.
                text = piece if index + 1 == len(pieces) else piece.removesuffix(" ")
                ids += self._ids_after_word(text) if index else token_ids(self._inner, text)
        around = self._inner.tokenizer("")["input_ids"]
        start = self._inner.tokens_start
        return {"input_ids": [*around[:start], *ids, *(around[-1:] if self._inner.tokenizer_adds_end_token else [])]}

    def _ids_after_word(self, text: str) -> list[int]:
        """SentencePiece, which T5 has, reads any text as if it began with a blank. Here a word is before it."""
        if not text or text[0].isspace():
            return token_ids(self._inner, text)
        word, both = token_ids(self._inner, ORDINARY), token_ids(self._inner, f"{ORDINARY}{text}")
        return both[len(word) :] if both[: len(word)] == word else token_ids(self._inner, text)
