"""The interface through which a training reports progress, requests samples, and learns when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..core.adapter import Adapter
from .loop import Step, Training
from .settings import TrainingSettings


class Watch(Protocol):
    """Callbacks of a training. `on_step` and `draw` may raise to stop it."""

    settings: TrainingSettings

    def begin(self, training: Training, fingerprint: str) -> None:
        """The next step begins. Its number is above 1 if the training was resumed."""
        ...

    def enter(self, phase: str) -> None:
        """training, sampling, validating or saving"""
        ...

    def tell(self, texts: Sequence[str]) -> None:
        """What is known before the first step."""
        ...

    def warn(self, texts: Sequence[str]) -> None:
        """A message for the user."""
        ...

    def on_step(self, step: Step, training: Training) -> None:
        """A step is done."""
        ...

    def on_validation(self, step: int, loss: float) -> None:
        """A validation loss, measured after this step."""
        ...

    def wants_sample(self, step: int, is_last: bool) -> bool:
        """Whether to draw sample pictures after this step."""
        ...

    def draw(self, step: int, adapter: Adapter, is_last: bool) -> None:
        """Draw with the current adapter. The models are unpatched, as other nodes get them."""
        ...

    def wants_finish(self) -> bool:
        """Whether to end after this step, as if it were the last."""
        ...
