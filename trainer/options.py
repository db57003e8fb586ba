"""Optional parts of a training. All of them are off by default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["adamw", "prodigy"]
Schedule = Literal["constant", "cosine", "linear"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "prodigy")
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "linear")
FlowWeighting = Literal["uniform", "logit_normal", "sigma_sqrt", "cosmap"]
FLOW_WEIGHTINGS: tuple[FlowWeighting, ...] = ("uniform", "logit_normal", "sigma_sqrt", "cosmap")

SHARES = ("caption_dropout", "background_weight", "token_freeze_after")
WEIGHTS = ("prior_weight", "min_snr_gamma")
AUGMENTATIONS = ("random_crops", "color_jitter")


@dataclass(frozen=True)
class TrainOptions:
    """Optional parts of a run. Raises ValueError for values that cannot work."""

    optimizer: Optimizer = "adamw"
    schedule: Schedule = "constant"  # of the learning rates, over all steps
    warmup_steps: int = 0  # steps in which the learning rates rise to their values
    prior_weight: float = 0.0  # of the prior preservation loss
    caption_dropout: float = 0.0  # fraction of examples with an empty caption
    horizontal_flips: bool = False  # half of all targets and references are mirrored
    random_crops: float = 0.0  # fraction of each side that is cropped from a target, at a random position
    color_jitter: float = 0.0  # range of changes to brightness, contrast and saturation of a reference
    background_weight: float = 0.0  # loss weight outside of the mask; 1: the same as inside
    min_snr_gamma: float = 0.0  # 0: off
    flow_weighting: FlowWeighting = "uniform"  # of noise levels; only for models that learn a flow
    keep_token_norm: bool = False  # token vectors keep their initial norm
    token_freeze_after: float = 1.0  # fraction of the steps after which the token embedding is frozen

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("flow_weighting", FLOW_WEIGHTINGS),
        ):
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
        if self.flow_weighting != "uniform" and self.min_snr_gamma > 0:
            raise ValueError(
                f"flow_weighting is '{self.flow_weighting}' and min_snr_gamma is {self.min_snr_gamma}: both weight the "
                "noise levels. Set min_snr_gamma to 0, or flow_weighting to uniform."
            )
        for name in AUGMENTATIONS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share from 0 to below 1.")

    @property
    def depends_on_steps(self) -> bool:
        """Whether a step depends on the total number of steps."""
        return self.schedule != "constant" or self.token_freeze_after < 1
