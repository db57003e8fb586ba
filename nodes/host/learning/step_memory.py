"""What a step takes of the device's memory beside the loaded models, before the first one is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ....core.layers import SelfAttentionLayer
from ....core.lora import parameter_shapes
from ....trainer.config import TrainConfig
from ....trainer.examples import Example
from .activations import activations, text_activations
from .text_encoders import out_of_place
from .training_models import TrainingModels

FLOAT32 = 4
# Tensors of a parameter's size: itself, its gradient, the optimizer's, the average, and a copy to compute with.
COPIES = {"adamw": 6, "prodigy": 8}
GIB = 2**30


class StepMemory(NamedTuple):
    """Bytes."""

    trainables: float
    stored: float  # for the backward pass
    work: float

    @property
    def total(self) -> float:
        return sum(self)


def step_memory(
    models: TrainingModels,
    layers: Sequence[SelfAttentionLayer],
    examples: Sequence[Example],
    text_tokens: int,
    config: TrainConfig,
    *,
    checkpointing: bool,
) -> StepMemory:
    """Of a whole batch of the largest of these examples, on loaded models."""
    network, dtype = models.patcher.model.diffusion_model, models.dtype
    encoder = models.clip.cond_stage_model if models.needs_clip else None
    height, width = max((example.latent.shape[-2:] for example in examples), key=lambda size: size[0] * size[1])
    rows = config.batch_size
    numbers = sum(a * b for a, b in parameter_shapes(layers, config.rank).values())
    found = activations(network, layers, height, width, text_tokens, checkpointing)
    texts = 0.0
    if encoder is not None and config.token_learning_rate > 0:
        # Text encoders compute in float32, and longer texts are read in parts of the same length.
        parts = [part for part in encoder.modules() if out_of_place(part, torch.float32, False) is not None]
        texts = FLOAT32 * text_activations(encoder, parts, text_tokens, checkpointing)
    return StepMemory(
        trainables=COPIES[config.options.optimizer] * FLOAT32 * numbers,
        stored=rows * (found.kept * dtype.itemsize + texts),
        work=rows * found.work * dtype.itemsize + FLOAT32 * _largest_weight(network, encoder),
    )


def _largest_weight(*modules: nn.Module | None) -> int:
    """Of one layer: kernels copy weights that are stored in another format, or in another order."""
    layers = [layer for module in modules if module is not None for layer in module.modules()]
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    return max(weight.numel() for weight in weights)


def in_words(memory: StepMemory, free: float, device: torch.device) -> str:
    return (
        f"A step takes about {gigabytes(memory.total)} of memory beside the loaded models; {gigabytes(free)} are free "
        f"on {device}."
    )


def shortage(memory: StepMemory, checkpointed: StepMemory | None, free: float) -> list[str]:
    """A warning, where it does not seem to fit. checkpointed: the same with gradient checkpointing, if it is off."""
    if memory.total <= free:
        return []
    if checkpointed is not None:
        advice = f"With gradient_checkpointing it is about {gigabytes(checkpointed.total)}."
        if checkpointed.total > free:
            advice = f"{advice} Lower the resolution or the batch_size as well."
    else:
        advice = "Lower the resolution or the batch_size."
    return [
        f"A step takes about {gigabytes(memory.total)} of memory, and {gigabytes(free)} are free, so it may not last. "
        f"{advice}"
    ]


def gigabytes(size: float) -> str:
    return f"{size / GIB:.1f} GB" if size >= GIB / 10 else f"{size / 2**20:.0f} MB"
