"""Image prompts: VAE latents of pictures of a subject, each with an optional mask and an optional text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_REPEATS: int = 4  # how often the shortest text of a batch may be repeated


class TextConditioning(NamedTuple):
    """Output of the text encoder. cross_attn (b, tokens, width), pooled (b, width) if the model needs it.

    lengths: number of valid tokens of each row, for networks whose result depends on it; the rest is padding.
    None: all tokens are valid, and the text may be repeated.
    """

    cross_attn: Tensor
    pooled: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TextConditioning:
        """Move to a device, and cast if a dtype is given."""
        cross_attn, pooled = (None if x is None else x.to(device, dtype) for x in (self.cross_attn, self.pooled))
        return self._replace(cross_attn=cross_attn, pooled=pooled)

    def expand(self, rows: int) -> TextConditioning:
        """Expand a text of one row to `rows` rows, without a copy."""
        pooled = None if self.pooled is None else self.pooled.expand(rows, *self.pooled.shape[1:])
        lengths = None if self.lengths is None else self.lengths * rows
        return TextConditioning(self.cross_attn.expand(rows, *self.cross_attn.shape[1:]), pooled, lengths)

    def take(self, rows: Sequence[int]) -> TextConditioning:
        """Select rows, in this order. Padding that none of them needs is removed."""
        indices = list(rows)
        pooled = None if self.pooled is None else self.pooled[indices]
        if self.lengths is None:
            return TextConditioning(self.cross_attn[indices], pooled)
        lengths = tuple(self.lengths[index] for index in indices)
        return TextConditioning(self.cross_attn[indices, : max(lengths)], pooled, lengths)

    def by_length(self) -> list[list[int]]:
        """Indices of rows, grouped by number of tokens. A group can share one call."""
        if self.lengths is None:
            return [list(range(len(self.cross_attn)))]
        return [
            [index for index, n in enumerate(self.lengths) if n == length] for length in dict.fromkeys(self.lengths)
        ]

    @staticmethod
    def stack(texts: Sequence[TextConditioning]) -> TextConditioning:
        """Stack texts along the batch. There is a pooled vector if all of them have one.

        Texts are repeated to a common length, which does not change the result of cross-attention. Texts with `lengths`
        are padded instead.
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
    """Repeat a text to `length` tokens. (b, tokens, width) -> (b, length, width)"""
    times, left = divmod(length, cross_attn.shape[1])
    assert times and not left, "the length is a multiple of the text's"
    return cross_attn.repeat(1, times, 1)


def fit_together(lengths: Sequence[int]) -> bool:
    """Whether texts of these lengths may share a batch. ComfyUI has the same rule."""
    return math.lcm(*lengths) <= MOST_REPEATS * min(lengths)


@dataclass(frozen=True)
class ReferenceImage:
    """One picture of an image prompt.

    latent (1, c, h, w) from the VAE, unscaled. mask (h_px, w_px) in 0..1, 1 where the subject is; None: everywhere.
    `text` is the text of the reference pass. None: the adapter's class conditioning.
    """

    latent: Tensor
    mask: Tensor | None = None
    text: TextConditioning | None = None


@dataclass(frozen=True)
class ImagePrompt:
    """One or more pictures. Their tokens share one softmax, so several pictures together count as much as one."""

    pictures: tuple[ReferenceImage, ...]

    def __add__(self, other: ImagePrompt) -> ImagePrompt:
        return ImagePrompt(self.pictures + other.pictures)
