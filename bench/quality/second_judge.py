"""A second judge that nobody here has trained: ImageNet features, and colours of the subject.

Drawn pictures are stored beside the results, where git ignores them. So another judge needs no new training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from demo.base.imagenet import JUDGE, Embedder
from demo.base.judge import subject_mask
from demo.base.scenes import Scene, render

from .results import Result, ResultStore

BINS = 6  # of each colour channel
COLUMNS = 10


class Look(NamedTuple):
    """Means over pictures, each compared with the real scene of the same prompt."""

    imagenet: float  # cosine of pooled features of the whole pictures
    colour: float  # overlap of the histograms of the subjects' pixels


def look(embedder: Any, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> Look:
    """`scenes[i]` is the scene that `images[i]` should show."""
    distinct = list(dict.fromkeys(scenes))
    truths = {scene: render(scene) for scene in distinct}
    embedded = dict(zip(distinct, embedder.embed(list(truths.values())), strict=True))
    wanted: list[Tensor] = [embedded[scene] for scene in scenes]
    drawn = embedder.embed(list(images))
    cosines = [float(a @ b) for a, b in zip(drawn, wanted, strict=True)]
    colours = [colour_likeness(image, truths[scene]) for image, scene in zip(images, scenes, strict=True)]
    return Look(float(np.mean(cosines)), float(np.mean(colours)))


def colour_likeness(image: Image.Image, real: Image.Image) -> float:
    """Overlap in 0..1, over the subject's pixels in either picture. 0 if no subject is found in one of them."""
    found = [_histogram(picture) for picture in (image, real)]
    if any(histogram is None for histogram in found):
        return 0.0
    ours, theirs = found
    return float(np.minimum(ours, theirs).sum())  # type: ignore[call-overload]  # neither is None


def _histogram(image: Image.Image) -> np.ndarray | None:
    """Colours of the subject's pixels, each shared by the neighbouring bins. -> (BINS**3,) of sum 1"""
    pixels = np.asarray(image.convert("RGB"))[subject_mask(image)[2]]  # (n, 3)
    if not len(pixels):
        return None
    place = np.clip(pixels / 256 * BINS - 0.5, 0, BINS - 1)
    low = np.floor(place).astype(int)
    upper = place - low  # share of the next bin
    histogram = np.zeros((BINS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        share = np.where(corner, upper, 1 - upper).prod(axis=1)
        index = np.minimum(low + corner, BINS - 1)
        np.add.at(histogram, tuple(index.T), share)
    return histogram.ravel() / histogram.sum()


class SecondJudge:
    """Stores pictures and their scores, by the keys of their results."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self._cells, self._pictures = ResultStore(folder / "second_judge.jsonl"), pictures

    @cached_property
    def _embedder(self) -> Embedder:
        return Embedder()

    def file(self, key: Result) -> Path:
        return self._pictures / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.webp"

    def add(self, key: Result, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> None:
        """Store the pictures and score them."""
        path = self.file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        side = images[0].width
        joined = Image.new("RGB", (COLUMNS * side, -(-len(images) // COLUMNS) * side))
        for i, image in enumerate(images):
            joined.paste(image, (i % COLUMNS * side, i // COLUMNS * side))
        joined.save(path, lossless=True)
        self.judge(key, images, scenes)

    def judge(self, key: Result, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> None:
        named = {**key, "judge": JUDGE}
        if self._cells.find(named) is None:
            self._cells.add(named, look(self._embedder, images, scenes)._asdict())

    def judge_kept(self, result: Result, scenes: Sequence[Scene]) -> None:
        """The stored pictures of a result, if there are any. Nothing is drawn."""
        path = self.file(result["key"])
        if not path.exists():
            return
        joined = Image.open(path).convert("RGB")
        side = joined.width // COLUMNS
        places = [(i % COLUMNS * side, i // COLUMNS * side) for i in range(len(scenes))]
        self.judge(result["key"], [joined.crop((x, y, x + side, y + side)) for x, y in places], scenes)

    def said_of(self, result: Result) -> Result | None:
        return self._cells.find({**result["key"], "judge": JUDGE})
