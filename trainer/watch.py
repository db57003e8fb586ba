"""What a training asks of whoever watches it: to be told, to draw, and when to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..core.adapter import Adapter
from .loop import Step, Training
from .settings import TrainingSettings


class Watch(Protocol):
    """`on_step` and `draw` may raise to stop the training."""

    settings: TrainingSettings

    def begin(self, training: Training, fingerprint: str) -> None:
        """The next step is about to be taken. It is not the first where the training goes on from an earlier run."""
        ...

    def enter(self, phase: str) -> None:
        """training, sampling, validating or saving"""
        ...

    def warn(self, texts: Sequence[str]) -> None:
        """Something that the user should know."""
        ...

    def on_step(self, step: Step, training: Training) -> None:
        """A step is done."""
        ...

    def on_validation(self, step: int, loss: float) -> None:
        """Measured after that step."""
        ...

    def wants_sample(self, step: int, is_last: bool) -> bool:
        """Whether pictures are to be drawn after that step."""
        ...

    def draw(self, step: int, adapter: Adapter, is_last: bool) -> None:
        """Draw with the adapter as it would be now. The models are as every other node has them."""
        ...

    def wants_finish(self) -> bool:
        """Whether to end here, as if no more steps had been wanted."""
        ...
