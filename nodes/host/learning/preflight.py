"""Warnings about the inputs of a training, before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from ....trainer.examples import TrainingSet
from .training_set import Subject

ALIKE_SIDE = 32  # pixels; pictures are compared at this size
ALIKE_WITHIN = 0.05  # largest difference of a pixel, of 1
LITTLE = 0.02  # share of a picture; a smaller mask gets a warning


def preflight(subject: Subject, captions: Sequence[tuple[str, ...]], has_word: Callable[[str], bool]) -> list[str]:
    """Warnings about similar or small pictures, small masks, and captions without the placeholder token."""
    return [
        *_similar(subject.pictures),
        *_small_pictures(subject.pictures, subject.resolution),
        *_small_masks(subject.masks),
        *_without_word(captions, has_word, subject.placeholder_token),
    ]


def counts(data: TrainingSet, captions: Sequence[tuple[str, ...]], has_word: Callable[[str], bool], steps: int) -> str:
    """The numbers of pictures, pairs, steps and captions, as a text for the log."""
    with_word = sum(any(map(has_word, texts)) for texts in captions)
    targets, others = len(data.examples), len(data.views) or len(data.examples) - 1
    return (
        f"{len(captions)} pictures, {targets * others} pairs of a picture and an image prompt, {steps} steps. "
        f"{with_word} captions hold the word, {len(captions) - with_word} do not."
    )


def _similar(pictures: Sequence[Tensor]) -> list[str]:
    small = [F.adaptive_avg_pool2d(picture.float(), ALIKE_SIDE) for picture in pictures]
    if len(small) < 2 or any((picture - small[0]).abs().amax().item() > ALIKE_WITHIN for picture in small[1:]):
        return []
    return [
        "All pictures look alike, so that little is learned of the subject itself. Take some from other sides, in "
        "other light and in other places."
    ]


def _small_pictures(pictures: Sequence[Tensor], resolution: int) -> list[str]:
    sides = [(picture.shape[-1] * picture.shape[-2]) ** 0.5 for picture in pictures]
    smaller = [number for number, side in enumerate(sides, start=1) if side < 0.75 * resolution]
    if not smaller:
        return []
    return [
        f"{len(smaller)} of {len(pictures)} pictures are smaller than the resolution {resolution} and are enlarged, "
        f"which teaches blur. The smallest has about {min(sides):.0f} pixels a side: lower the resolution, or take "
        "larger pictures."
    ]


def _small_masks(masks: Sequence[Tensor | None]) -> list[str]:
    shares = [(number, mask.float().mean().item()) for number, mask in enumerate(masks, start=1) if mask is not None]
    little = [number for number, share in shares if share < LITTLE]
    if not little:
        return []
    return [f"The masks of pictures {', '.join(map(str, little))} hide nearly everything. White is the subject."]


def _without_word(
    captions: Sequence[tuple[str, ...]], has_word: Callable[[str], bool], placeholder_token: str
) -> list[str]:
    without = [number for number, texts in enumerate(captions, start=1) if not any(map(has_word, texts))]
    if not without:
        return []
    return [
        f"{len(without)} of {len(captions)} captions do not hold the word '{placeholder_token}' (of pictures "
        f"{', '.join(map(str, without[:10]))}). Those pictures teach the word nothing."
    ]
