"""Which of many pictures are the same, or show the same, without keeping them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

ALIKE_SIDE = 32  # pixels, at which pictures are compared
ALIKE_WITHIN = 0.03  # of 1, in every one of those pixels: more than compression changes, less than a moved subject


@dataclass
class DistinctPicture:
    """One that is learned: its place among the given ones, its captions, and the number of what it shows.

    `number` is equal for pictures that show the same.
    """

    place: int
    captions: tuple[str, ...]
    number: int


@dataclass
class DistinctPictures:
    """Identical pictures under the same mask are one, with the captions of all.

    The same picture under another mask, or saved in another way, stays, under the same number: as each other's image
    prompts they would teach to copy.
    """

    found: list[DistinctPicture] = field(default_factory=list)
    _seen: int = 0
    _by_values: dict[bytes, DistinctPicture] = field(default_factory=dict)
    _small: Tensor = field(default_factory=lambda: torch.empty(0, 3, ALIKE_SIDE, ALIKE_SIDE))  # of those in `found`

    def add(self, picture: Tensor, mask: Tensor | None, captions: tuple[str, ...]) -> DistinctPicture | None:
        """Picture (1, 3, h, w) and mask (h, w). -> None where it is one that has come before"""
        place, values = self._seen, _values(picture, mask)
        self._seen += 1
        known = self._by_values.get(values)
        if known is not None:
            known.captions = tuple(dict.fromkeys((*known.captions, *captions)))
            return None
        small = F.adaptive_avg_pool2d(picture, ALIKE_SIDE)  # (1, 3, 32, 32)
        # Whether small versions agree everywhere, as those of a picture and its compressed copy do.
        alike = ((self._small - small).abs().amax(dim=(1, 2, 3)) <= ALIKE_WITHIN).nonzero()
        number = self.found[int(alike[0])].number if len(alike) else len(self.found)
        distinct = self._by_values[values] = DistinctPicture(place, captions, number)
        self.found.append(distinct)
        self._small = torch.cat([self._small, small.cpu().float()])
        return distinct

    def tell(self) -> None:
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
