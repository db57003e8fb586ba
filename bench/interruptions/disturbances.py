"""What goes wrong in the middle of a training: memory and disk. To be used in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

Train = Callable[[], str]


def memory_that_fails_once(train: Train, step: int) -> str | None:
    """The training answers, and goes on to its end."""
    failures = []

    def fail() -> None:
        if not failures:
            failures.append(step)
            raise MemoryError("injected")

    return _disturbed(train, step, fail)


def memory_that_stays_short(train: Train, step: int) -> str | None:
    """It fails from this step on, so that the training ends there."""

    def fail() -> None:
        raise MemoryError("injected")

    return _disturbed(train, step, fail)


def full_disk(train: Train, step: int) -> str | None:
    """Nothing can be saved, and at this step the training is cancelled."""
    import comfy.model_management as management
    import torch

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(torch, "save", full):
        return _disturbed(train, step, lambda: management.interrupt_current_processing(True))


def kill_at(train: Train, step: int, kill: Callable[[], None]) -> None:
    _disturbed(train, step, kill)


def _disturbed(train: Train, step: int, happen: Callable[[], None]) -> str | None:
    """Let it happen in the middle of every step from this one on. -> the digest; None where the training was stopped"""
    from sa_inject.trainer.loop import Training
    from sa_inject.trainer.losses import PairLosses

    take, compute, place = Training.__next__, PairLosses.of_pairs, [0]

    def counted(self: Any) -> Any:
        place[0] = len(self.losses) + 1
        return take(self)

    def disturbed(self: Any, part: Any) -> Any:
        if place[0] >= step:
            happen()
        return compute(self, part)

    with mock.patch.object(Training, "__next__", counted), mock.patch.object(PairLosses, "of_pairs", disturbed):
        try:
            return train()
        except BaseException as error:
            if type(error).__name__ in ("InterruptProcessingException", "MemoryError"):
                return None
            raise
