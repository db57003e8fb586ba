"""The user's pictures, masks and captions, turned into what a training learns from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ....trainer.examples import Example, TrainingSet, Version
from ....trainer.views import augmented_views
from ..images import bucket_size, cover, encode_picture
from ..masks import check_leaves_something, keeps_something, resized_mask
from .autograd import clone_for_autograd

log = logging.getLogger(__name__)

VIEWS = 8  # augmented image prompts for a picture that is alone
ALIKE_SIDE = 32  # pixels, at which pictures are compared
ALIKE_WITHIN = 0.03  # of 1, in every one of those pixels: more than compression changes, less than a moved subject


@dataclass(frozen=True)
class Subject:
    """What is to be learned: pictures (1, 3, h, w), their masks and captions, and the word for it."""

    pictures: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    captions: Sequence[str] | None
    placeholder_token: str
    class_word: str
    resolution: int


def training_set(model: Any, vae: Any, subject: Subject, captions: Sequence[tuple[str, ...]], seed: int) -> TrainingSet:
    """Encode every picture at its own aspect and about the wanted number of pixels.

    Raises ValueError where a mask leaves nothing of its picture, and where the VAE gives no usable latents.
    """
    fitted = []
    for number, (picture, mask) in enumerate(zip(subject.pictures, subject.masks, strict=True), start=1):
        size = bucket_size(picture.shape[-2], picture.shape[-1], subject.resolution)
        picture, mask = cover(picture, mask, size)
        check_leaves_something(mask, number, "Train SA-Inject Adapter", size)
        fitted.append((picture, mask))
    distinct = without_repeats(fitted, captions)
    examples = [_example(model, vae, *parts) for parts in distinct]
    if len({example.picture for example in examples}) > 1:
        return TrainingSet(examples)
    log.info("There is one picture only: augmented views of it serve as image prompts.")
    generator = torch.Generator().manual_seed(seed)
    views = []
    for picture, mask, said, _ in distinct:
        views += [_example(model, vae, *view, said) for view in _usable_views(picture, mask, generator)]
    return TrainingSet(examples, views)


class DistinctPicture(NamedTuple):
    """Picture (1, 3, h, w), mask (h, w), captions, and the number of what it shows: equal for the same picture."""

    picture: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]
    number: int


def without_repeats(
    fitted: Sequence[tuple[Tensor, Tensor | None]], captions: Sequence[tuple[str, ...]]
) -> list[DistinctPicture]:
    """Let identical pictures under the same mask be one, with the captions of all.

    The same picture under another mask, or saved in another way, stays, under the same number: as each other's image
    prompts they would teach to copy.
    """
    distinct: list[DistinctPicture] = []
    small: list[Tensor] = []
    for (picture, mask), caption in zip(fitted, captions, strict=True):
        for index, known in enumerate(distinct):
            if torch.equal(known.picture, picture) and _same_mask(known.mask, mask):
                distinct[index] = known._replace(captions=tuple(dict.fromkeys((*known.captions, *caption))))
                break
        else:
            tiny = _tiny(picture)
            alike = (known.number for known, other in zip(distinct, small, strict=True) if _looks_alike(tiny, other))
            distinct.append(DistinctPicture(picture, mask, caption, next(alike, len(distinct))))
            small.append(tiny)
    if len(distinct) < len(fitted):
        log.info("%d of %d pictures are there more than once and count once.", len(fitted) - len(distinct), len(fitted))
    again = len(distinct) - len({known.number for known in distinct})
    if again:
        log.info(
            "%d pictures show the same as another one. They are learned too, under their own masks and captions, and "
            "are never the image prompt of that other one.",
            again,
        )
    return distinct


def _same_mask(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _tiny(picture: Tensor) -> Tensor:
    """(1, 3, h, w) -> (1, 3, 32, 32)"""
    return F.adaptive_avg_pool2d(picture, ALIKE_SIDE)


def _looks_alike(one: Tensor, other: Tensor) -> bool:
    """Whether tiny versions of two pictures agree everywhere, as those of a picture and its compressed copy do."""
    return (one - other).abs().amax().item() <= ALIKE_WITHIN


def _usable_views(
    picture: Tensor, mask: Tensor | None, generator: torch.Generator
) -> list[tuple[Tensor, Tensor | None]]:
    """Augmented views in which something of the subject is left."""
    views = augmented_views(picture, mask, VIEWS, generator)
    usable = [view for view in views if view[1] is None or keeps_something(view[1])]
    return usable or [(picture.flip(-1), None if mask is None else mask.flip(-1))]


def _example(
    model: Any, vae: Any, picture: Tensor, mask: Tensor | None, captions: tuple[str, ...], number: int | None = None
) -> Example:
    latent = encode_picture(vae, picture, model.model.latent_format.latent_channels)
    small = resized_mask(mask, *latent.shape[-2:])
    return Example(model.model.process_latent_in(latent).cpu(), captions, small, number)


def without_inference_tensors(data: TrainingSet) -> TrainingSet:
    """The same examples with tensors that autograd accepts."""

    def picture(latent: Tensor, mask: Tensor | None) -> Version:
        return Version(clone_for_autograd(latent), None if mask is None else clone_for_autograd(mask))

    def normal(example: Example) -> Example:
        latent, mask = picture(example.latent, example.mask)
        as_target = tuple(picture(*version) for version in example.as_target)
        as_reference = tuple(picture(*version) for version in example.as_reference)
        return Example(latent, example.captions, mask, example.picture, as_target, as_reference)

    return TrainingSet(
        *([normal(one) for one in examples] for examples in (data.examples, data.views, data.class_pictures))
    )
