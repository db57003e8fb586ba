"""How long a training still takes, from the times of the steps that this process has taken."""

from __future__ import annotations

from collections import deque

MEASURED_STEPS = 3  # before there is an estimate
RECENT_STEPS = 50


class TimeLeft:
    """Steps, and what is done between them: samples, validation. All times are seconds of one clock.

    Steps of an earlier process do not count. Neither does the first of this one, in which everything is still cold.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._taken = 0
        self._pauses = 0
        self._paused = 0.0  # seconds in all pauses
        self._since: float | None = None  # when the current step began
        self._pause_since: float | None = None

    def begin_step(self, now: float) -> None:
        """A pause ends, if there was one, and a step begins."""
        if self._pause_since is not None:
            self._pauses += 1
            self._paused += now - self._pause_since
            self._pause_since = None
        self._since = now

    def begin_pause(self, now: float) -> None:
        """Something else than steps begins. Nothing changes if it has begun already."""
        if self._pause_since is None:
            self._pause_since = now

    def end_step(self, now: float) -> None:
        """A step is done, and the next one begins, if no pause does."""
        self._taken += 1
        if self._taken > 1 and self._since is not None:
            self._steps.append(now - self._since)
        self._since = now

    @property
    def is_known(self) -> bool:
        return self._taken >= MEASURED_STEPS

    @property
    def seconds_a_step(self) -> float | None:
        return sum(self._steps) / len(self._steps) if self.is_known else None

    def left(self, steps: int, pauses: int = 0) -> float | None:
        """Seconds that so many steps and pauses will take. None before there is an estimate."""
        step = self.seconds_a_step
        if step is None:
            return None
        return steps * step + (pauses * self._paused / self._pauses if self._pauses else 0.0)
