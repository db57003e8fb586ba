"""Trainings that were stopped: what they had learned is kept, and the same training goes on from there.

"The same" is a fingerprint of everything that the result depends on but the number of steps, so that no option and no
question is needed: whoever queues the same again gets what an undisturbed run would have given.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from ...core.whole_file import whole_file
from ...trainer.loop import Training

log = logging.getLogger(__name__)

FOLDER = "unfinished"  # inside models/sa_inject
EXTENSION = ".pt"  # which the list of adapters does not show
SECONDS_BETWEEN = 300.0  # what a crash may cost


class Unfinished:
    """The file of one training. `begin` before its first step, `step_done` after each, then `keep` or `finish`."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / FOLDER / f"{fingerprint}{EXTENSION}"
        self._saved_at = time.monotonic()
        self._is_ours = True

    def begin(self, training: Training, steps: int) -> None:
        """Go on where the same training was stopped, if it was; one that came further than `steps` is left as it is."""
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            done = len(state["losses"])
            if done > steps:
                log.info("This training was stopped at step %d, and %d are wanted: it begins anew.", done, steps)
                self._is_ours = False
                return
            training.load_state_dict(state)
        except Exception as error:  # whatever torch.load says of a damaged file
            raise UnfinishedError(
                f"This training was stopped before, and what was kept of it cannot be read ({error}). "
                f"Delete {self.path} to begin anew."
            ) from error
        log.info("This training was stopped at step %d, and goes on from there.", done)

    def step_done(self, training: Training) -> None:
        """Keep what there is every few minutes, in case the whole program ends."""
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN:
            self.keep(training)

    def keep(self, training: Training) -> None:
        """Write what is learned so far. A full disk is told, not raised: it must not end a training."""
        self._saved_at = time.monotonic()
        if not (training.losses and self._is_ours):
            return
        try:
            with whole_file(self.path) as temporary:
                torch.save(training.state_dict(), temporary)
        except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's name for a full disk
            log.warning("What is learned so far could not be kept in %s: %s", self.path, error)

    def finish(self) -> None:
        """The file has served: it is deleted."""
        if self._is_ours:
            self.path.unlink(missing_ok=True)


class UnfinishedError(RuntimeError):
    """A file of a stopped training that cannot be used."""
