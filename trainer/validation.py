"""Validation loss: the loss of fixed pairs with fixed noise and noise levels, measured during training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import TrainConfig
from .examples import Example, Pair, TrainingSet, group_by_shape
from .loop import Training
from .noised import NoisedPairs, noised_pairs

LEVELS = (0.15, 0.4, 0.6, 0.85)  # fractions of the noise schedule, from its clean end
MOST_PICTURES = 4  # denoised per measurement, which then takes about as long as this many steps
LEAST_TO_HOLD_OUT = 6  # pictures, of which one may be left out of the training
SEED = 20_000_003  # seed of a separate generator, so that measuring does not change the training


class Validation:
    """Pairs of all pictures, or of the held-out ones, with fixed noise and noise levels."""

    def __init__(self, data: TrainingSet, held_out: Sequence[Example], config: TrainConfig, sigmas: Tensor) -> None:
        """sigmas (t,): all noise levels of the model, ascending"""
        generator = torch.Generator().manual_seed(SEED)
        self._groups: list[NoisedPairs] = []
        pairs = _pairs(data, held_out)
        for share in LEVELS:
            sigma = sigmas[int(share * (len(sigmas) - 1))]
            used = share < 1 - config.reference_start
            at_level = [pair if used else pair._replace(reference=None) for pair in pairs]
            for indices in group_by_shape(at_level):
                group = [at_level[index] for index in indices]
                levels = sigma.repeat(len(group))
                self._groups.append(noised_pairs(group, levels, config.reference_mode, generator))

    def measure(self, training: Training, device: torch.device) -> float:
        """The mean loss of the adapter that the training would give now."""
        total = rows = 0.0
        with training.averaged():
            for group in self._groups:
                total += training.loss_of(group._replace(sigma=group.sigma.to(device))) * len(group.pairs)
                rows += len(group.pairs)
        return total / rows


def held_out_of(data: TrainingSet) -> tuple[TrainingSet, list[Example]]:
    """The set without its last picture, and that picture's examples. The whole set if it has too few pictures."""
    pictures = [index if example.picture is None else example.picture for index, example in enumerate(data.examples)]
    if len(set(pictures)) < LEAST_TO_HOLD_OUT:
        return data, []
    last = pictures[-1]
    kept = [example for example, picture in zip(data.examples, pictures, strict=True) if picture != last]
    held = [example for example, picture in zip(data.examples, pictures, strict=True) if picture == last]
    return TrainingSet(kept, data.views, data.class_pictures), held


def _pairs(data: TrainingSet, held_out: Sequence[Example]) -> list[Pair]:
    if held_out:
        return [Pair(target, target.captions[0], data.examples[0]) for target in held_out[:MOST_PICTURES]]
    count = len(data.examples)
    indices = [number * count // min(count, MOST_PICTURES) for number in range(min(count, MOST_PICTURES))]
    return [
        Pair(data.examples[index], data.examples[index].captions[0], (data.others(index) or list(data.views))[0])
        for index in indices
    ]
