"""From the user's pictures, masks and captions to a TrainingSet."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....trainer.examples import Example, TrainingSet, Version
from ....trainer.options import TrainOptions
from ....trainer.views import augmented_views
from ..images import bucket_size, cover
from ..masks import check_leaves_something, keeps_something
from .autograd import clone_for_autograd, is_inference_tensor
from .distinct import DistinctPictures
from .example_encoder import ExampleEncoder

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

log = logging.getLogger(__name__)

VIEWS = 8  # augmented image prompts, if there is only one picture


@dataclass(frozen=True)
class Subject:
    """The subject of a training: pictures (1, 3, h, w) in 0..1, masks (h, w), captions, and placeholder token.

    resolution: pixels; a picture is scaled to about this number squared. `class_pictures` show others of its kind.
    `initial_embedding`: a file in the host's embeddings folder; empty: the class word's embedding.
    """

    pictures: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    captions: Sequence[str] | None
    placeholder_token: str
    class_word: str
    resolution: int
    class_pictures: Sequence[Tensor] = ()
    initial_embedding: str = ""


def training_set(
    model: ModelPatcher,
    vae: VAE,
    subject: Subject,
    captions: Sequence[tuple[str, ...]],
    seed: int,
    options: TrainOptions | None = None,
) -> TrainingSet:
    """Encode every picture with its own aspect ratio, at about the subject's resolution.

    seed: of augmented views and of color jitter. Raises ValueError if a mask leaves nothing of its picture, and if the
    VAE's latents cannot be used.
    """
    encoder = ExampleEncoder(model, vae, subject.resolution, options or TrainOptions(), seed)
    distinct, encoded = DistinctPictures(), []
    for index, (picture, mask, texts) in enumerate(zip(subject.pictures, subject.masks, captions, strict=True)):
        fitted, kept = _fitted(picture, mask, subject.resolution, index + 1)
        if distinct.add(fitted, kept, texts) is not None:
            encoded.append(encoder.example(fitted, kept, *_enlarged(encoder, picture, mask, fitted)))
    distinct.log_summary()
    examples = [
        dataclasses.replace(example, captions=known.captions, picture=known.number)
        for example, known in zip(encoded, distinct.found, strict=True)
    ]
    class_pictures = [encoder.class_example(picture, subject.class_word) for picture in subject.class_pictures]
    if len({example.picture for example in examples}) > 1:
        encoder.log_summary()
        return TrainingSet(examples, class_pictures=class_pictures)
    log.info("There is one picture only: augmented views of it serve as image prompts.")
    generator = torch.Generator().manual_seed(seed)
    views = []
    for example, known in zip(examples, distinct.found, strict=True):
        picture, mask = _fitted(
            subject.pictures[known.index], subject.masks[known.index], subject.resolution, known.index + 1
        )
        for view in _usable_views(picture, mask, generator):
            views.append(dataclasses.replace(encoder.example(*view), captions=example.captions))
    return TrainingSet(examples, views, class_pictures)


def _fitted(picture: Tensor, mask: Tensor | None, resolution: int, number: int) -> tuple[Tensor, Tensor | None]:
    size = bucket_size(picture.shape[-2], picture.shape[-1], resolution)
    picture, mask = cover(picture, mask, size)
    check_leaves_something(mask, number, "Train SA-Inject Adapter", size)
    return picture, mask


def _enlarged(
    encoder: ExampleEncoder, picture: Tensor, mask: Tensor | None, fitted: Tensor
) -> tuple[Tensor, Tensor | None] | tuple[()]:
    """The picture at the size for random crops. Empty if there are no random crops."""
    size = encoder.enlarged_size(fitted)
    return () if size is None else cover(picture, mask, size)


def _usable_views(
    picture: Tensor, mask: Tensor | None, generator: torch.Generator
) -> list[tuple[Tensor, Tensor | None]]:
    """Augmented views with a part of the subject in them, or else one flipped picture."""
    views = augmented_views(picture, mask, VIEWS, generator)
    usable = [view for view in views if view[1] is None or keeps_something(view[1])]
    return usable or [(picture.flip(-1), None if mask is None else mask.flip(-1))]


def without_inference_tensors(data: TrainingSet) -> TrainingSet:
    """The same examples with tensors that autograd accepts."""

    def picture(latent: Tensor, mask: Tensor | None) -> Version:
        return Version(_for_autograd(latent), None if mask is None else _for_autograd(mask))

    def copied(example: Example) -> Example:
        latent, mask = picture(example.latent, example.mask)
        as_target = tuple(picture(*version) for version in example.as_target)
        as_reference = tuple(picture(*version) for version in example.as_reference)
        return Example(latent, example.captions, mask, example.picture, as_target, as_reference)

    groups = (data.examples, data.views, data.class_pictures)
    return TrainingSet(*([copied(example) for example in examples] for examples in groups))


def _for_autograd(tensor: Tensor) -> Tensor:
    """Itself where autograd accepts it already, as one on disk: a copy would be in memory."""
    return clone_for_autograd(tensor) if is_inference_tensor(tensor) else tensor
