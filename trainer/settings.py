"""Settings of a training besides its numbers: samples, validation, what is saved, and optional parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .options import TrainOptions

NEVER = -1  # a number of steps that is never reached
UNLIMITED = 1e30  # larger than any gradient norm


@dataclass(frozen=True)
class TrainingSettings:
    """Inputs of SA-Inject Training Settings, with the same names. The defaults apply if that node is not used.

    The last five change what is learned. The others do not.
    """

    sample_every: int = 0  # steps between sample pictures; 0: at the training node's own interval
    sample_prompts: tuple[str, ...] = ()  # none: a template with the placeholder token
    kept: int = 4  # number of adapters that are kept from the last samples
    validation_every: int = 0  # steps between measurements; 0: with every sample; NEVER
    hold_out: bool = False  # measure on a picture that is left out of the training, if there are six or more
    save_every: int = 0  # steps between saved states, in addition to every five minutes; 0: never
    weight_decay: float = 1e-2
    max_gradient_norm: float = 1.0  # maximum gradient norm; 0: no clipping
    initial_embedding: str = ""  # file of the initial token embedding; none: the class word's embedding
    class_images: tuple[Tensor, ...] = ()  # IMAGE batches (b, h, w, c) of other subjects of the class
    options: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        for name, least in (("sample_every", 0), ("kept", 0), ("validation_every", NEVER), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    def for_config(self) -> dict[str, Any]:
        """The settings that are part of a TrainConfig."""
        clipped = self.max_gradient_norm or UNLIMITED
        return {"weight_decay": self.weight_decay, "max_gradient_norm": clipped, "options": self.options}


def prompt_lines(text: str) -> tuple[str, ...]:
    """Split a text with one prompt per line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
