"""The placeholder token in ComfyUI's text encoders: it is found in prompts and replaced by its token embedding.

Training and sampling use the same tokenizer. word_tokens.py puts the vectors among the tokens of each encoder.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from comfy.sd1_clip import SDClipModel
from torch import Tensor, nn

from ...core.image_prompt import TextConditioning
from .word_tokens import is_clip, marked, token_ids, with_vectors, word_ids
from .words import find_words, folded, hidden_words

if TYPE_CHECKING:
    from comfy.sd import CLIP

    from .host_types import Tokenizer

log = logging.getLogger(__name__)


def encoder_tokenizers(clip: CLIP) -> dict[str, Tokenizer]:
    """The CLIP tokenizers of a ComfyUI CLIP by the name of their encoder: {"clip_l": SDTokenizer, ...}."""
    return _encoder_tokenizers(clip.tokenizer)


def _encoder_tokenizers(tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    inner = vars(_unwrapped(tokenizer)).values()
    return {t.embedding_key: t for t in inner if hasattr(t, "_try_get_embedding")}


def clip_with_token(clip: CLIP, placeholder_token: str, vectors: Mapping[str, Tensor]) -> CLIP:
    """Return a clone of a CLIP in which `placeholder_token` has these vectors, {encoder: (n, width)}.

    The given CLIP is not changed. Raises ValueError if the vectors do not fit the text encoders.
    """
    tokenizers = encoder_tokenizers(clip)
    if not tokenizers:
        raise ValueError("The connected CLIP has no CLIP text encoder. Connect the CLIP of the base model.")
    if set(vectors) != set(tokenizers):
        raise ValueError(
            f"The token '{placeholder_token}' was trained for {', '.join(vectors)}, but the connected CLIP has "
            f"{', '.join(tokenizers)}. Connect the CLIP of the base model that the adapter was trained on."
        )
    for name, tokenizer in tokenizers.items():
        if vectors[name].shape[-1] != tokenizer.embedding_size:
            raise ValueError(
                f"The token '{placeholder_token}' has embedding size {vectors[name].shape[-1]} for {name}, but the "
                f"connected CLIP expects {tokenizer.embedding_size}. Connect the CLIP of the adapter's base model."
            )
    patched_clip = clip.clone()
    patched_clip.tokenizer = PlaceholderTokenizer(clip.tokenizer, placeholder_token, vectors)
    return patched_clip


class PlaceholderTokenizer:
    """A ComfyUI tokenizer with one more word. Everything else is passed on to the wrapped tokenizer."""

    def __init__(self, tokenizer: Tokenizer, placeholder_token: str, vectors: Mapping[str, Tensor]) -> None:
        self._tokenizer = copy.copy(_unwrapped(tokenizer))
        # By folded spelling. Of two adapters with the same word, the later one is used.
        self._words = {**getattr(tokenizer, "_words", {}), folded(placeholder_token): dict(vectors)}
        self._reported: set[str] = set()  # texts for which a missing word was already logged
        for attribute, inner in vars(self._tokenizer).items():
            if hasattr(inner, "_try_get_embedding"):
                setattr(self._tokenizer, attribute, self._patch_tokenizer(inner))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_tokenizer" not in self.__dict__:
            raise AttributeError(name)  # during copying there are no attributes yet
        return getattr(self._tokenizer, name)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, list]:
        found = find_words(text, self._words, partial(_is_embedding, self))
        self._report(text, hidden_words(text, self._words, found))
        numbers = {word: number for number, word in enumerate(self._words)}
        for start, end, word in reversed(found):
            text = f"{text[:start]}{marked(numbers[word])}{text[end:]}"
        return self._tokenizer.tokenize_with_weights(text, return_word_ids, **kwargs)

    def _report(self, text: str, hidden: Sequence[str]) -> None:
        if not hidden or text in self._reported:
            return
        self._reported.add(text)
        log.warning(
            "SA-Inject: the placeholder token '%s' was not found in the prompt '%s', where its letters are part of a "
            "longer word. Put a space beside it.",
            "', '".join(hidden),
            text,
        )

    def _patch_tokenizer(self, inner: Tokenizer) -> Tokenizer:
        return with_vectors(inner, {at: word[inner.embedding_key] for at, word in enumerate(self._words.values())})


def _unwrapped(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer._tokenizer if isinstance(tokenizer, PlaceholderTokenizer) else tokenizer


def _is_embedding(tokenizer: Tokenizer, name: str) -> bool:
    """Whether the whole name is an embedding file of the host."""
    for inner in _encoder_tokenizers(tokenizer).values():
        if inner.embedding_directory is not None and name.split():
            embedding, *_, leftover = inner._try_get_embedding(name)
            if embedding is not None and not leftover.strip(" ,"):
                return True
    return False


def finder(clip: CLIP, placeholder_token: str) -> Callable[[str], bool]:
    """A function that says whether the placeholder token is found in a text."""
    return lambda text: bool(find_words(text, [placeholder_token], partial(_is_embedding, clip.tokenizer)))


def warn_of_taken_word(clip: CLIP, placeholder_token: str, vectors: Mapping[str, Tensor]) -> str | None:
    """Log and return a warning if the CLIP already has this word from another adapter."""
    known = getattr(clip.tokenizer, "_words", {}).get(folded(placeholder_token))
    if known is None or (known.keys() == vectors.keys() and all(torch.equal(known[k], vectors[k]) for k in known)):
        return None
    warning = (
        f"This CLIP already reads '{placeholder_token}' as another adapter's word, which is replaced. Give this "
        "one another word in placeholder_token to have both."
    )
    log.warning("SA-Inject: %s", warning)
    return warning


def check_placeholder_token(clip: CLIP | None, placeholder_token: str) -> None:
    """Raise ValueError for a word that cannot be used. The message suggests one that can."""
    spelling = folded(placeholder_token)
    what_to_use = (
        f"The placeholder token is '{placeholder_token}'. Use one made-up word of letters, without spaces, commas, "
        "colons, parentheses or braces, such as 'sainj'."
    )
    if not spelling or _breaks_the_prompt(spelling) or _breaks_the_prompt(placeholder_token):
        raise ValueError(what_to_use)
    for name, tokenizer in (encoder_tokenizers(clip) if clip is not None else {}).items():
        spellings = {placeholder_token, spelling}
        if any(1 in (len(token_ids(tokenizer, word)), len(word_ids(tokenizer, word))) for word in spellings):
            raise ValueError(
                f"The placeholder token '{placeholder_token}' is an ordinary word of the text encoder's vocabulary "
                f"({name}), whose meaning would be lost. Use a made-up word such as '{placeholder_token}xyz'."
            )
    if not _is_found(placeholder_token):
        raise ValueError(what_to_use)


def _breaks_the_prompt(word: str) -> bool:
    """Whether the word has a special meaning in prompts, for the host or its frontend."""
    if re.search(r"[\s():\\,{}|]|//|/\*", word) or word.startswith("embedding"):
        return True
    with contextlib.suppress(ValueError):
        float(word)  # a weight
        return True
    return False


def _is_found(word: str) -> bool:
    has_letters = any(unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lm", "Lo", "So") for c in word)
    return has_letters and find_words(f"a photo of {word} toy", [word]) == [(11, 11 + len(word), word)]


def initial_token_embedding(clip: CLIP, class_word: str, count: int) -> dict[str, Tensor]:
    """The mean embedding of the class word's tokens, repeated: {encoder: (count, width)}, float32.

    The vectors start equal. They become different in training, because each has its own position.
    """
    vectors = {}
    for name, tokenizer in encoder_tokenizers(clip).items():
        ids = word_ids(tokenizer, class_word)
        if not ids:
            raise ValueError("The class word is empty. Say what the subject is in a word, such as 'dog' or 'toy'.")
        table = getattr(clip.cond_stage_model, name).transformer.get_input_embeddings()
        rows = table(torch.tensor([ids], device=table.weight.device), out_dtype=torch.float32)
        vectors[name] = rows[0].mean(dim=0).repeat(count, 1)
    return vectors


def encode_text(clip: CLIP, texts: Sequence[str]) -> TextConditioning:
    """Encode texts, one row each, on a loaded CLIP. Gradients reach the token embedding."""
    tokens = [clip.tokenize(text) for text in texts]
    sizes = {tuple(tuple(map(len, chunks)) for chunks in of_text.values()) for of_text in tokens}
    # Texts of one length form a batch, so that every weight is read and cast once.
    batches = [tokens] if len(sizes) == 1 else [[of_text] for of_text in tokens]
    found = [_encode_batch(clip, batch) for batch in batches]
    if not all(is_clip(tokenizer) for tokenizer in encoder_tokenizers(clip).values()):
        # From a language model, for a network with joint attention over text and picture.
        found = [text._replace(lengths=(text.cross_attn.shape[1],) * len(text.cross_attn)) for text in found]
    return TextConditioning.stack(found)


def _encode_batch(clip: CLIP, tokens: Sequence[Mapping[str, list]]) -> TextConditioning:
    """Texts that have equally many chunks.

    ComfyUI encodes the chunks of one long prompt, joins them, and returns the first chunk's pooled vector.
    """
    rows = len(tokens)
    stage = clip.cond_stage_model
    stage.reset_clip_options()
    if clip.layer_idx is not None:
        stage.set_clip_options({"layer": clip.layer_idx})
    chunks = {name: [chunk for of_text in tokens for chunk in of_text[name]] for name in tokens[0]}
    with _pooled_vectors(stage) as pooled_of_chunks:
        cross_attn, pooled = stage.encode_token_weights(chunks)[:2]
    cross_attn = cross_attn.reshape(rows, -1, cross_attn.shape[-1])
    if pooled is None or rows == 1:
        return TextConditioning(cross_attn, pooled)
    per_text = len(next(iter(chunks.values()))) // rows
    firsts = [of_chunks[: rows * per_text : per_text].to(pooled) for of_chunks in pooled_of_chunks]  # one per encoder
    return TextConditioning(cross_attn, next(p for p in firsts if _same(p[:1], pooled)))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


@contextlib.contextmanager
def _pooled_vectors(stage: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the pooled vectors of each text encoder inside `stage`, (chunks, width)."""
    found: list[Tensor] = []

    def collect(module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        if outputs[1] is not None:
            found.append(outputs[1])

    handles = [m.register_forward_hook(collect) for m in stage.modules() if isinstance(m, SDClipModel)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
