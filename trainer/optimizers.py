"""Optimizers and learning rate schedules."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from . import options
from .config import TrainConfig

PRODIGY_COMMAND = "pip install prodigyopt"


def available_optimizers() -> list[str]:
    """Optimizers that can be used here. Prodigy needs its own package."""
    try:
        importlib.import_module("prodigyopt")
    except ImportError:
        return [name for name in options.OPTIMIZERS if name != "prodigy"]
    return list(options.OPTIMIZERS)


def check_optimizer(name: str) -> None:
    """Raise ValueError, with advice, for an optimizer that cannot be used here."""
    if name not in available_optimizers():
        raise ValueError(
            f"The optimizer '{name}' is not installed. Run '{PRODIGY_COMMAND}' in the Python environment of ComfyUI "
            "and restart it, or choose adamw."
        )


def build_optimizer(config: TrainConfig, lora: Sequence[nn.Parameter], tokens: Sequence[nn.Parameter]) -> Optimizer:
    """An optimizer with two groups: the parameters of the LoRA and of the token embedding.

    Prodigy (Mishchenko and Defazio, 2023, arXiv 2306.06101) estimates one learning rate for both. Our learning rates
    have no effect with it, except that 0 freezes a group. The settings are those that its authors advise for diffusion
    models. `safeguard_warmup` is used with a warm-up only. Otherwise the rate would stay near its much too small
    initial value for about a hundred steps.
    """
    groups = [
        {"params": list(lora), "lr": config.lora_learning_rate, "weight_decay": config.weight_decay},
        {"params": list(tokens), "lr": config.token_learning_rate, "weight_decay": 0.0},
    ]
    if config.options.optimizer == "adamw":
        return AdamW(groups)
    check_optimizer("prodigy")
    from prodigyopt import Prodigy  # type: ignore[reportMissingImports]  # it is optional

    for group in groups:
        is_frozen = group["lr"] == 0
        group.update({"lr": 0.0, "weight_decay": 0.0} if is_frozen else {"lr": 1.0})
    return cast(Any, Prodigy)(groups, use_bias_correction=True, safeguard_warmup=config.options.warmup_steps > 0)


def build_schedule(optimizer: Optimizer, config: TrainConfig) -> LambdaLR | None:
    """The schedule of the learning rates. None if they are constant."""
    chosen = config.options
    if chosen.schedule == "constant" and chosen.warmup_steps == 0:
        return None
    factor = functools.partial(
        learning_rate_factor, steps=config.steps, schedule=chosen.schedule, warmup=chosen.warmup_steps
    )
    return LambdaLR(optimizer, factor)


def learning_rate_factor(done: int, steps: int, schedule: options.Schedule, warmup: int) -> float:
    """The factor after `done` steps: rises linearly for `warmup` steps, then stays constant or decays to 0."""
    if done < warmup:
        return (done + 1) / warmup
    progress = min(1.0, (done - warmup) / max(1, steps - warmup))  # from 0 to below 1
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0
