"""Training examples: latents with captions, and the choice of a reference for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .augment import random_window

T = TypeVar("T")


class Version(NamedTuple):
    """A variant of a picture: latent (1, c, h, w), mask (h, w). A larger one is cropped."""

    latent: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Example:
    """One training picture: latent (1, c, h, w) scaled as the model wants it, mask (h, w) in 0..1 in latent cells.

    Each time it is used, one of its captions is chosen at random, and one of its versions if there are any. Examples
    with the same `picture` are one picture under different masks, or saved in different files.
    """

    latent: Tensor
    captions: tuple[str, ...]
    mask: Tensor | None = None
    picture: int | None = None
    as_target: tuple[Version, ...] = ()
    as_reference: tuple[Version, ...] = ()

    def drawn(self, versions: Sequence[Version], generator: torch.Generator) -> Example:
        """With the latent and the mask of one of these versions. Unchanged if there are none."""
        if not versions:
            return self
        latent, mask = choice(versions, generator)
        height, width = self.latent.shape[-2:]
        latent, mask = random_window(latent, mask, (height, width), generator)
        return dataclasses.replace(self, latent=latent, mask=mask)


class Pair(NamedTuple):
    """A picture to denoise and a reference of the same subject (None: dropped out)."""

    target: Example
    caption: str
    reference: Example | None


@dataclass(frozen=True)
class TrainingSet:
    """Pictures of one subject. `views` are augmented versions, needed if there is no other picture.

    `class_pictures` show other subjects of the class. Their captions do not contain the placeholder token.

    The reference is never the picture that is denoised: identical pairs teach the model to copy.
    """

    examples: Sequence[Example]
    views: Sequence[Example] = ()
    class_pictures: Sequence[Example] = ()

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("There are no pictures to learn from.")
        if not self.views and not all(self.others(index) for index in range(len(self.examples))):
            raise ValueError("One picture alone needs augmented views to serve as image prompts.")

    def others(self, index: int) -> list[Example]:
        """Examples that may be the reference of this one: those of other pictures."""
        picture = self.examples[index].picture
        rest = [*self.examples[:index], *self.examples[index + 1 :]]
        return [example for example in rest if picture is None or example.picture != picture]

    def pairs(self, reference_dropout: float, generator: torch.Generator) -> PairStream:
        return PairStream(self, reference_dropout, generator)


class PairStream(Iterator[Pair]):
    """An endless stream of pairs. Every picture is used once before any is repeated."""

    def __init__(self, data: TrainingSet, reference_dropout: float, generator: torch.Generator) -> None:
        self.remaining: list[int] = []  # indices of the pictures that are still to come in this round
        self._data = data
        self._reference_dropout = reference_dropout
        self._generator = generator

    def __next__(self) -> Pair:
        examples, generator = self._data.examples, self._generator
        if not self.remaining:
            self.remaining = list(map(int, torch.randperm(len(examples), generator=generator)))
        index = self.remaining.pop(0)
        target = examples[index]
        others = self._data.others(index) or list(self._data.views)
        dropped = torch.rand((), generator=generator).item() < self._reference_dropout
        reference, caption = choice(others, generator), choice(target.captions, generator)
        target = target.drawn(target.as_target, generator)
        reference = reference.drawn(reference.as_reference, generator)
        return Pair(target, caption, None if dropped else reference)


def choice(options: Sequence[T], generator: torch.Generator) -> T:
    return options[int(torch.randint(len(options), (), generator=generator))]


def group_by_shape(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of pairs that can be stacked: equal sizes of targets and of references."""
    groups: dict[tuple[torch.Size, torch.Size | None], list[int]] = {}
    for index, pair in enumerate(pairs):
        reference = None if pair.reference is None else pair.reference.latent.shape
        groups.setdefault((pair.target.latent.shape, reference), []).append(index)
    return list(groups.values())
