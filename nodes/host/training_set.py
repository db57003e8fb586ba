"""The user's pictures, masks and captions, turned into what a training learns from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...trainer.examples import Example, TrainingSet
from ...trainer.views import augmented_views
from .images import bucket_size, cover, encode_picture
from .trainable import normal_tensor

log = logging.getLogger(__name__)

VIEWS = 8  # augmented image prompts for a picture that is alone


@dataclass(frozen=True)
class Subject:
    """What is to be learned: pictures (1, 3, h, w), their masks and captions, and the word for it."""

    pictures: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    captions: Sequence[str] | None
    placeholder: str
    class_word: str
    resolution: int


def training_set(model: Any, vae: Any, subject: Subject, captions: Sequence[tuple[str, ...]], seed: int) -> TrainingSet:
    """Encode every picture at its own aspect and about the wanted number of pixels."""
    fitted = [
        cover(picture, mask, bucket_size(picture.shape[-2], picture.shape[-1], subject.resolution))
        for picture, mask in zip(subject.pictures, subject.masks, strict=True)
    ]
    fitted, captions = _without_repeats(fitted, captions)
    examples = [
        _example(model, vae, picture, mask, caption) for (picture, mask), caption in zip(fitted, captions, strict=True)
    ]
    if len(examples) > 1:
        return TrainingSet(examples)
    log.info("There is one picture only: augmented views of it serve as image prompts.")
    generator = torch.Generator().manual_seed(seed)
    views = augmented_views(*fitted[0], VIEWS, generator)
    return TrainingSet(examples, [_example(model, vae, picture, mask, captions[0]) for picture, mask in views])


def _without_repeats(
    fitted: Sequence[tuple[Tensor, Tensor | None]], captions: Sequence[tuple[str, ...]]
) -> tuple[list[tuple[Tensor, Tensor | None]], list[tuple[str, ...]]]:
    """Let identical pictures be one, with the captions of all: as each other's image prompts they teach to copy."""
    distinct: list[tuple[Tensor, Tensor | None]] = []
    said: list[tuple[str, ...]] = []
    for (picture, mask), caption in zip(fitted, captions, strict=True):
        for place, (known, _) in enumerate(distinct):
            if torch.equal(known, picture):
                said[place] = tuple(dict.fromkeys((*said[place], *caption)))
                break
        else:
            distinct.append((picture, mask))
            said.append(caption)
    if len(distinct) < len(fitted):
        log.info("%d of %d pictures are there more than once and count once.", len(fitted) - len(distinct), len(fitted))
    return distinct, said


def _example(model: Any, vae: Any, picture: Tensor, mask: Tensor | None, captions: tuple[str, ...]) -> Example:
    latent = encode_picture(vae, picture, model.model.latent_format.latent_channels)
    small = None if mask is None else F.adaptive_avg_pool2d(mask[None, None], latent.shape[-2:])[0, 0]
    return Example(model.model.process_latent_in(latent).cpu(), captions, small)


def without_inference_tensors(data: TrainingSet) -> TrainingSet:
    """The same examples with tensors that autograd accepts."""

    def normal(example: Example) -> Example:
        mask = None if example.mask is None else normal_tensor(example.mask)
        return Example(normal_tensor(example.latent), example.captions, mask)

    return TrainingSet([normal(e) for e in data.examples], [normal(v) for v in data.views])
