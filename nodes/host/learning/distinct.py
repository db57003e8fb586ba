"""Find pictures that are identical, or that show the same, without keeping them in memory."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

ALIKE_SIDE = 32  # pixels; pictures are compared at this size
ALIKE_WITHIN = 0.03  # largest difference, of 1: above that of compression, below that of a moved subject


@dataclass
class DistinctPicture:
    """A picture of the training: its index among the given ones, and its captions.

    `number` is equal for pictures that show the same.
    """

    index: int
    captions: tuple[str, ...]
    number: int


@dataclass
class DistinctPictures:
    """Merges identical pictures with the same mask into one that has all their captions.

    The same picture with another mask, or in another file format, is kept and gets the same number. Such pictures must
    not be each other's image prompt, because they would teach the model to copy.
    """

    found: list[DistinctPicture] = field(default_factory=list)
    _seen: int = 0
    _by_values: dict[bytes, DistinctPicture] = field(default_factory=dict)
    _small: Tensor = field(default_factory=lambda: torch.empty(0, 3, ALIKE_SIDE, ALIKE_SIDE))  # of those in `found`

    def add(self, picture: Tensor, mask: Tensor | None, captions: tuple[str, ...]) -> DistinctPicture | None:
        """Add a picture (1, 3, h, w) with its mask (h, w). -> None if it is identical to an earlier one"""
        index, values = self._seen, _values(picture, mask)
        self._seen += 1
        known = self._by_values.get(values)
        if known is not None:
            known.captions = tuple(dict.fromkeys((*known.captions, *captions)))
            return None
        small = F.adaptive_avg_pool2d(picture, ALIKE_SIDE)  # (1, 3, 32, 32)
        # The small versions of a picture and its compressed copy agree in every pixel.
        alike = ((self._small - small).abs().amax(dim=(1, 2, 3)) <= ALIKE_WITHIN).nonzero()
        number = self.found[int(alike[0])].number if len(alike) else len(self.found)
        distinct = self._by_values[values] = DistinctPicture(index, captions, number)
        self.found.append(distinct)
        self._small = torch.cat([self._small, small.cpu().float()])
        return distinct

    def log_summary(self) -> None:
        if len(self.found) < self._seen:
            repeats = self._seen - len(self.found)
            log.info("%d of %d pictures are there more than once and count once.", repeats, self._seen)
        again = len(self.found) - len({known.number for known in self.found})
        if again:
            log.info(
                "%d pictures show the same as another one. They are learned too, under their own masks and captions, "
                "and are never the image prompt of that other one.",
                again,
            )


def _values(picture: Tensor, mask: Tensor | None) -> bytes:
    digest = hashlib.sha256()
    for tensor in (picture, mask):
        digest.update(b"none" if tensor is None else repr(tuple(tensor.shape)).encode())
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.digest()
