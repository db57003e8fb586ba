"""An image prompt: pictures of a subject as VAE latents, with an optional mask and an optional text each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_REPEATS: int = 4  # of the shortest text


class TextConditioning(NamedTuple):
    """What the text encoder said. cross_attn (b, tokens, width), pooled (b, width) where the model wants one.

    lengths: how many tokens of each row are its text, for a network that notices how many there are; after them comes
    filling that no network may read. None: all of them, and the text may be repeated.
    """

    cross_attn: Tensor
    pooled: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> TextConditioning:
        pooled = None if self.pooled is None else self.pooled.to(device)
        return TextConditioning(self.cross_attn.to(device), pooled, self.lengths)

    def take(self, rows: Sequence[int]) -> TextConditioning:
        """Some of the rows, in this order, without filling that none of them needs."""
        places = list(rows)
        pooled = None if self.pooled is None else self.pooled[places]
        if self.lengths is None:
            return TextConditioning(self.cross_attn[places], pooled)
        lengths = tuple(self.lengths[place] for place in places)
        return TextConditioning(self.cross_attn[places, : max(lengths)], pooled, lengths)

    def by_length(self) -> list[list[int]]:
        """The places of rows that have equally many tokens, which a network can be called with at once."""
        if self.lengths is None:
            return [list(range(len(self.cross_attn)))]
        return [
            [place for place, n in enumerate(self.lengths) if n == length] for length in dict.fromkeys(self.lengths)
        ]


def stack_conditionings(texts: Sequence[TextConditioning]) -> TextConditioning:
    """Texts as rows of one. There is a pooled vector if all have one.

    Shorter texts are repeated up to a length that all have in common, which does not change what cross-attention makes
    of them; those whose length a network notices are filled up.
    """
    if any(text.lengths is not None for text in texts):
        return _filled(texts)
    length = math.lcm(*(text.cross_attn.shape[1] for text in texts))
    cross_attn = torch.cat([repeated(text.cross_attn, length) for text in texts])
    return TextConditioning(cross_attn, _pooled(texts))


def _filled(texts: Sequence[TextConditioning]) -> TextConditioning:
    rows = [text.lengths or (text.cross_attn.shape[1],) * len(text.cross_attn) for text in texts]
    longest = max(text.cross_attn.shape[1] for text in texts)
    cross_attn = [F.pad(text.cross_attn, (0, 0, 0, longest - text.cross_attn.shape[1])) for text in texts]
    return TextConditioning(torch.cat(cross_attn), _pooled(texts), tuple(n for lengths in rows for n in lengths))


def _pooled(texts: Sequence[TextConditioning]) -> Tensor | None:
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return torch.cat(pooled) if len(pooled) == len(texts) else None


def repeated(cross_attn: Tensor, length: int) -> Tensor:
    """A text as often as it takes to be so many tokens long. (b, tokens, width) -> (b, length, width)"""
    times, left = divmod(length, cross_attn.shape[1])
    assert times and not left, "the length is a multiple of the text's"
    return cross_attn.repeat(1, times, 1)


def fit_together(lengths: Sequence[int]) -> bool:
    """Whether texts of so many tokens are worth having as rows of one, as ComfyUI decides it."""
    return math.lcm(*lengths) <= MOST_REPEATS * min(lengths)


@dataclass(frozen=True)
class ReferenceImage:
    """One image prompt.

    latent (1, c, h, w) as the VAE gave it; mask (h_px, w_px) in 0..1, white where the subject is; `text` is what the
    reference pass reads, the adapter's own class word when None.
    """

    latent: Tensor
    mask: Tensor | None = None
    text: TextConditioning | None = None


@dataclass(frozen=True)
class ImagePrompt:
    """One or more pictures, whose tokens are attended to together: they count as much as one."""

    pictures: tuple[ReferenceImage, ...]

    def __add__(self, other: ImagePrompt) -> ImagePrompt:
        return ImagePrompt(self.pictures + other.pictures)
