"""What the quality bench gives to a method: a subject, a model and settings. And what it gets back.

Import only after the host has started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.base.scenes import IMAGE_SIZE
from sa_inject.core.image_prompt import ImagePrompt, TextConditioning
from sa_inject.nodes.host.images import split_images
from sa_inject.nodes.host.learning import training_set
from sa_inject.trainer.config import TrainConfig

from .learn import Models
from .subjects import PLACEHOLDER, Settings, Subject

RANK = 16


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """-> (b, h, w, c) in 0..1, as in ComfyUI"""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255


@dataclass
class TrainingTask:
    """One subject, to be learned with one learning rate."""

    host: Any
    models: Models
    subject: Subject
    settings: Settings
    rate: float
    word_rate: float = 0.0
    negative: Any = None  # see `unprompted`
    reference_texts: Sequence[TextConditioning] = ()  # for each picture, in place of the class word
    strength: float | None = None  # for applying ours; None: the node's default

    def pictures(self) -> Tensor:
        """(b, h, w, c) in 0..1, as in ComfyUI."""
        return as_pixels(self.subject.pictures())

    def training_subject(self) -> training_set.Subject:
        pictures = split_images([self.pictures()], "bench")
        return training_set.Subject(
            pictures=pictures,
            masks=[None] * len(pictures),
            captions=self.subject.captions(self.subject.phrase),
            placeholder_token=PLACEHOLDER,
            class_word=self.subject.artwork.class_word,
            resolution=IMAGE_SIZE,
        )

    def config(self, **changes: Any) -> TrainConfig:
        chosen: dict[str, Any] = {
            "steps": self.settings.steps,
            "batch_size": self.settings.batch,
            "lora_learning_rate": self.rate,
            "token_learning_rate": self.word_rate,
            "rank": RANK,
            "alpha": float(RANK),
            "seed": self.settings.seed,
        }
        return TrainConfig(**{**chosen, **changes})

    def image_prompt(self) -> Any:
        (prompt,) = self.host.execute(
            "EncodeImagePrompt", images=self.pictures(), vae=self.models.vae, resolution=IMAGE_SIZE
        )
        if not self.reference_texts:
            return prompt
        pairs = zip(prompt.pictures, self.reference_texts, strict=True)
        return ImagePrompt(tuple(replace(picture, text=text) for picture, text in pairs))


class TrainedModel(NamedTuple):
    """The result of a training: a model, a CLIP, the subject's name in prompts, and the number and size of trained
    values.
    """

    model: Any
    clip: Any
    words: str
    parameters: int = 0
    file_bytes: int = 0


class Method(NamedTuple):
    train: Callable[[TrainingTask], TrainedModel]
    rates: tuple[tuple[float, float], ...] = ((0.0, 0.0),)  # (LoRA rate, token rate); a sweep chooses one
    swept_as: str | None = None  # the method whose sweep is used for this one
