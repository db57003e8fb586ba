"""Texts and progress shown on a node while it runs."""

from __future__ import annotations

import logging
import time

import comfy.model_management as model_management
from comfy.utils import ProgressBar
from server import PromptServer

from ...trainer.loop import Step

log = logging.getLogger(__name__)

SMOOTHING = 0.95  # of the shown loss, because single steps are noisy


def show_on_node(text: str, node_id: str | None) -> None:
    """Show a line of text on a node, if a browser is connected."""
    if node_id is not None and getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def warn_on_node(said: str, node_id: str | None) -> None:
    """Log a warning and show it on the node. There it begins with a capital, unless with an input's name."""
    log.warning("SA-Inject: %s", said)
    is_input = "_" in said.partition(" ")[0]
    show_on_node(said if is_input else said[0].upper() + said[1:], node_id)


class TrainingProgress:
    """A progress bar with step, loss and time left, which also notices Cancel. Create it inside `execute`."""

    def __init__(self, steps: int, node_id: str | None) -> None:
        self._bar = ProgressBar(steps, node_id=node_id)
        self._steps = steps
        self._node_id = node_id
        self._start = time.monotonic()
        self._loss: float | None = None
        self._earlier = 0  # steps that another run has taken, which this one goes on from

    def say(self, text: str) -> None:
        show_on_node(text, self._node_id)

    def update(self, step: Step) -> None:
        """Show a finished step. Raises the host's InterruptProcessingException when the user cancelled."""
        if self._loss is None:
            self._loss, self._earlier = step.loss, step.number - 1
        self._loss = SMOOTHING * self._loss + (1 - SMOOTHING) * step.loss
        left = (time.monotonic() - self._start) / (step.number - self._earlier) * (self._steps - step.number)
        self.say(f"step {step.number}/{self._steps}, loss {self._loss:.4f}, {_duration(left)} left")
        self._bar.update_absolute(step.number, self._steps)
        model_management.throw_exception_if_processing_interrupted()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
