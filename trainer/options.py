"""What a training can do beyond the method itself. Every default leaves the run as the method alone has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["adamw", "prodigy"]
Schedule = Literal["constant", "cosine", "linear"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "prodigy")
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "linear")

SHARES = ("caption_dropout", "background_weight", "token_freeze_after")
WEIGHTS = ("prior_weight", "min_snr_gamma")
AUGMENTATIONS = ("random_crops", "color_jitter")


@dataclass(frozen=True)
class TrainOptions:
    """Optional parts of a run. Raises ValueError for a value that cannot work."""

    optimizer: Optimizer = "adamw"
    schedule: Schedule = "constant"  # of the learning rates, over all steps
    warmup_steps: int = 0  # in which the learning rates rise to their value
    prior_weight: float = 0.0  # of the loss that keeps the class as the frozen model has it
    caption_dropout: float = 0.0  # share of examples whose caption is empty
    horizontal_flips: bool = False  # half of all targets, and of all image prompts, are mirrored
    random_crops: float = 0.0  # share of each side that a target leaves out, at a place drawn anew each time
    color_jitter: float = 0.0  # how far brightness, contrast and saturation of an image prompt may change
    background_weight: float = 0.0  # of what lies outside the mask; 1: as much as what lies inside
    min_snr_gamma: float = 0.0  # 0: off
    keep_token_norm: bool = False  # vectors of the learned word keep the length that they begin with
    token_freeze_after: float = 1.0  # share of the steps after which the word does not change any more

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'; it is one of {', '.join(known)}.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must not be negative.")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1.")
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number that is not negative.")
        for name in AUGMENTATIONS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share from 0 to below 1.")

    @property
    def depends_on_steps(self) -> bool:
        """Whether the number of steps changes what each of them does."""
        return self.schedule != "constant" or self.token_freeze_after < 1
