"""The time that a training still needs, estimated from the times of its steps so far."""

from __future__ import annotations

from collections import deque

MEASURED_STEPS = 3  # before there is an estimate
RECENT_STEPS = 50


class TimeLeft:
    """Records steps and pauses between them (samples, validation). All times are seconds of one clock.

    Steps of an earlier process do not count. The first step of this one does not either, because it is slower.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._taken = 0
        self._pauses = 0
        self._paused = 0.0  # seconds in all pauses
        self._since: float | None = None  # when the current step began
        self._pause_since: float | None = None

    def begin_step(self, now: float) -> None:
        """End a pause, if there is one, and begin a step."""
        if self._pause_since is not None:
            self._pauses += 1
            self._paused += now - self._pause_since
            self._pause_since = None
        self._since = now

    def begin_pause(self, now: float) -> None:
        """Begin a pause. Does nothing during a pause."""
        if self._pause_since is None:
            self._pause_since = now

    def end_step(self, now: float) -> None:
        """End a step, and begin the next one if no pause begins."""
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
        """Estimate the seconds for a number of steps and pauses. None without an estimate."""
        step = self.seconds_a_step
        if step is None:
            return None
        return steps * step + (pauses * self._paused / self._pauses if self._pauses else 0.0)
