"""Random batches: the pairs, their noise levels, and their noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import TrainConfig
from .examples import Pair, TrainingSet, group_by_shape
from .noised import NoisedPairs, noised_pairs
from .prior import ClassPairs


class Batch(NamedTuple):
    """`size` pairs in groups of one shape. The noise of a group is drawn when the group is taken."""

    size: int
    groups: Iterator[NoisedPairs]


class RandomState(NamedTuple):
    """Everything that the next batch depends on."""

    generator: Tensor
    remaining: list[int]  # indices of the pictures that are not used yet in this pass over the data


class BatchSampler:
    """Draws batches with one generator, seeded by `config.seed`. sigmas (levels,): the model's, ascending."""

    def __init__(self, data: TrainingSet, sigmas: Tensor, config: TrainConfig, device: torch.device) -> None:
        self._data = data
        self._sigmas = sigmas
        self._config = config
        self._device = device
        self._generator = torch.Generator().manual_seed(config.seed)
        self._pairs = data.pairs(config.reference_dropout, self._generator)
        self._levels_with_reference = (1 - config.reference_start) * len(sigmas)  # from the lowest

    def state(self) -> RandomState:
        return RandomState(self._generator.get_state(), list(self._pairs.remaining))

    def restore(self, state: RandomState) -> None:
        self._generator.set_state(state.generator)
        self._pairs.remaining = list(state.remaining)

    def draw(self) -> Batch:
        """A batch of the subject's pictures. The levels are uniform over those of the model."""
        config = self._config
        batch = list(itertools.islice(self._pairs, config.batch_size))
        levels = torch.randint(len(self._sigmas), (len(batch),), generator=self._generator)
        batch = _drop_references_at_high_noise(batch, levels, self._levels_with_reference)
        batch = _drop_captions(batch, config.options.caption_dropout, self._generator)
        return Batch(len(batch), self._noised_groups(batch, levels))

    def draw_class_pictures(self) -> Batch:
        """A batch of class pictures, at the levels that have a reference."""
        batch = list(itertools.islice(ClassPairs(self._data, self._generator), self._config.batch_size))
        levels = torch.randint(math.ceil(self._levels_with_reference), (len(batch),), generator=self._generator)
        return Batch(len(batch), self._noised_groups(batch, levels))

    def _noised_groups(self, batch: Sequence[Pair], levels: Tensor) -> Iterator[NoisedPairs]:
        for indices in group_by_shape(batch):
            group, sigma = [batch[index] for index in indices], self._sigmas[levels[indices]].to(self._device)
            yield noised_pairs(group, sigma, self._config.reference_mode, self._generator)


def _drop_references_at_high_noise(batch: Sequence[Pair], levels: Tensor, first: float) -> list[Pair]:
    """Remove the references at noise levels from `first` on. Sampling starts there, without a reference."""
    return [
        pair if level < first else pair._replace(reference=None)
        for pair, level in zip(batch, map(int, levels), strict=True)
    ]


def _drop_captions(batch: Sequence[Pair], share: float, generator: torch.Generator) -> list[Pair]:
    """Give each pair an empty caption with probability `share`. With 0, no random number is drawn."""
    if share == 0:
        return list(batch)
    dropped = torch.rand(len(batch), generator=generator) < share
    return [pair._replace(caption="") if drop else pair for pair, drop in zip(batch, map(bool, dropped), strict=True)]
