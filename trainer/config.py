"""The settings of one training run, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..core.adapter import REFERENCE_MODES, ReferenceMode
from ..core.schedule import REFERENCE_START
from .options import TrainOptions


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. Raises ValueError for values that cannot work."""

    steps: int = 400
    batch_size: int = 1
    gradient_accumulation: int = 1  # batches per optimizer step
    lora_learning_rate: float = 1e-3
    token_learning_rate: float = 6e-3
    token_vectors: int = 4  # tokens of the placeholder token
    rank: int = 16
    alpha: float = 16.0
    reference_mode: ReferenceMode = "clean"
    seed: int = 0
    reference_dropout: float = 0.1  # fraction of examples without a reference, so that the token is also trained alone
    reference_start: float = REFERENCE_START
    # Weight averaging: step t has weight t**average_power. None: use the last step.
    average_power: float | None = 4.0
    weight_decay: float = 1e-2  # of the LoRA; for the token, decay would move it away from the vocabulary
    max_gradient_norm: float = 1.0
    loss_scaling: bool = False  # for float16, in which small gradients underflow
    options: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "token_vectors", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("lora_learning_rate", "token_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number that is not negative.")
        for name in ("alpha", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number above 0.")
        if self.average_power is not None and not 0 <= self.average_power < math.inf:
            raise ValueError(
                f"average_power is {self.average_power}; it must be None or a number that is not negative."
            )
        if not 0 <= self.reference_dropout <= 1:
            raise ValueError(f"reference_dropout is {self.reference_dropout}; it is a share from 0 to 1.")
        if not 0 <= self.reference_start < 1:
            raise ValueError(f"reference_start is {self.reference_start}; it is a share from 0 to below 1.")
        if self.lora_learning_rate == self.token_learning_rate == 0:
            raise ValueError("Both learning rates are 0, so nothing would be learned. Raise one of them.")
        if self.reference_mode not in REFERENCE_MODES:
            raise ValueError(f"reference_mode is '{self.reference_mode}'; it is one of {', '.join(REFERENCE_MODES)}.")
