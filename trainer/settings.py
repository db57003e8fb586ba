"""What a training may be told beyond its numbers: what is seen of it while it runs, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .options import TrainOptions

NEVER = -1  # in the place of a number of steps
UNLIMITED = 1e30  # longer than any gradient


@dataclass(frozen=True)
class TrainingSettings:
    """Inputs of SA-Inject Training Settings, under the same names. Its defaults are what holds without that node.

    The last five change what is learned, the others only what is seen of it.
    """

    sample_every: int = 0  # steps between sample pictures; 0: as the training node has it
    sample_prompts: tuple[str, ...] = ()  # none: a template with the learned word
    kept: int = 4  # adapters of the last samples that stay beside the finished one
    validation_every: int = 0  # steps between measurements; 0: at every sample; NEVER
    hold_out: bool = False  # measure at a picture that is not learned, where there are six or more
    save_every: int = 0  # steps after which the state is saved, besides every five minutes; 0: never
    weight_decay: float = 1e-2
    max_gradient_norm: float = 1.0  # 0: gradients are not clipped
    initial_embedding: str = ""  # the embedding that the word begins with; none: the class word's
    class_images: tuple[Tensor, ...] = ()  # IMAGE batches (b, h, w, c) that show others of the subject's kind
    options: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        for name, least in (("sample_every", 0), ("kept", 0), ("validation_every", NEVER), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    def for_config(self) -> dict[str, Any]:
        """The settings that a TrainConfig has."""
        clipped = self.max_gradient_norm or UNLIMITED
        return {"weight_decay": self.weight_decay, "max_gradient_norm": clipped, "options": self.options}


def prompt_lines(text: str) -> tuple[str, ...]:
    """A text with one prompt a line, as prompts."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
