"""An image prompt: pictures of a subject as VAE latents, with an optional mask and an optional text each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class ReferenceText(NamedTuple):
    """What the text encoder said. cross_attn (b, tokens, width), pooled (b, width) where the model wants one."""

    cross_attn: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Picture:
    """One image prompt.

    latent (1, c, h, w) as the VAE gave it; mask (h_px, w_px) in 0..1, white where the subject is; `text` is what the
    reference pass reads, the adapter's own subject phrase when None.
    """

    latent: Tensor
    mask: Tensor | None = None
    text: ReferenceText | None = None


@dataclass(frozen=True)
class ImagePrompt:
    """One or more pictures that share the weight of one."""

    pictures: tuple[Picture, ...]

    def __add__(self, other: ImagePrompt) -> ImagePrompt:
        return ImagePrompt(self.pictures + other.pictures)

    def fingerprint(self) -> str:
        """A hash of everything that can change the picture, stable over processes."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            text = picture.text or ReferenceText(picture.latent[:0])
            for tensor in (picture.latent, picture.mask, text.cross_attn, text.pooled):
                digest.update(b"none" if tensor is None else _bytes(tensor))
        return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return str(tuple(tensor.shape)).encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes()
