"""Checkpoints of trainings on disk. A stopped training resumes, and a finished one takes no step again.

A state is everything that a training needs to resume after a number of steps. A finished training can be continued
with more steps. The fingerprint in the file's name tells which training it belongs to.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ....core.atomic_write import atomic_write
from ....trainer.loop import Training

log = logging.getLogger(__name__)

FOLDER = "training_states"  # inside models/sa_inject
NAME = re.compile(r"(?P<fingerprint>[0-9a-f]+)-(?P<steps>\d+)-(?P<how>stopped|finished)(?:-of-(?P<wanted>\d+))?\.pt")
SAVE_INTERVAL_SECONDS = 300.0  # a crash loses at most this
KEPT_STATES = 10
KEPT_BYTES = 2 * 2**30
IN_USE_SECONDS = 3600.0  # a state may belong to a running training up to this age


class State(NamedTuple):
    steps: int
    is_finished: bool  # False: the training was stopped
    path: Path
    wanted: int | None = None  # steps of a training that the user has finished early


class CheckpointError(RuntimeError):
    """A state file that cannot be read."""


class TrainingCheckpoint:
    """The states of one training. Call `resume` before its first step, `on_step` after each, and `save` at the end."""

    def __init__(self, folder: Path, fingerprint: str, save_every: int = 0) -> None:
        """save_every: steps between saved states, besides one every few minutes; 0: only those"""
        self._save_every = save_every
        self._folder = folder / FOLDER
        self._fingerprint = fingerprint
        self._saved_at = time.monotonic()
        self._current: State | None = None  # loaded or saved last in this run

    def resume(self, training: Training, steps: int) -> int:
        """Load the state with the most steps, up to `steps`, if any. Raises CheckpointError if it is damaged.

        -> the last step: `steps`, or an earlier one if the user has finished this training early
        """
        states = sorted(state for state in _states(self._folder) if state.path.name.startswith(f"{self._fingerprint}-"))
        usable = [state for state in states if state.steps <= steps]
        if not usable:
            if states:
                log.info("This training %s, and %d are wanted: it begins anew.", _end(states[-1]), steps)
            return steps
        state = usable[-1]
        try:
            training.load_state_dict(torch.load(state.path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises many kinds for damaged files
            raise CheckpointError(
                f"This training {_how(state)} before, and what was kept of it cannot be read ({error}). "
                f"Delete {state.path} to begin anew."
            ) from error
        self._current = state
        if state.wanted == steps:
            log.info(
                "This training was finished early, at step %d of %d: no step is taken. More steps go on from there.",
                state.steps,
                steps,
            )
            return state.steps
        if state.steps < steps:
            log.info("This training %s, and goes on from there.", _end(state))
        else:
            log.info("This training %s before: no step is taken again.", _end(state))
        return steps

    def on_step(self, training: Training) -> None:
        """Save every few minutes and every `save_every` steps, because the process may be killed."""
        is_due = self._save_every > 0 and len(training.losses) % self._save_every == 0
        if is_due or time.monotonic() - self._saved_at >= SAVE_INTERVAL_SECONDS:
            self.save(training)

    def save(self, training: Training, is_finished: bool = False, wanted: int | None = None) -> None:
        """Write the current state. A full disk is logged and not raised, so that the training continues.

        wanted: the number of steps in the settings, if the user has finished the training early.
        """
        self._saved_at = time.monotonic()
        steps = len(training.losses)
        if steps == 0:
            return
        how = "stopped" if not is_finished else "finished" if wanted is None else f"finished-of-{wanted:06}"
        state = State(steps, is_finished, self._folder / f"{self._fingerprint}-{steps:06}-{how}.pt", wanted)
        try:
            self._current = self._again(state) or self._written(state, training)
            _remove_old(self._folder, newest=self._current.path)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
            log.warning("What is learned so far could not be kept in %s: %s", state.path, error)

    def discard_stopped(self) -> None:
        """Delete the state that this run loaded or saved last, unless it is of a finished training."""
        if self._current is not None and not self._current.is_finished:
            with contextlib.suppress(OSError):  # another process reads it; `_remove_old` deletes it later
                self._current.path.unlink(missing_ok=True)
            self._current = None

    def _again(self, state: State) -> State | None:
        """The last state, with a new time, if no step was taken since. None: it has to be written."""
        current = self._current
        if current is None or current.steps != state.steps or not current.path.exists():
            return None
        if state.is_finished and not current.is_finished:
            current.path.replace(state.path)
            current = state
        current.path.touch()
        return current

    def _written(self, state: State, training: Training) -> State:
        with atomic_write(state.path) as temporary:
            torch.save(training.state_dict(), temporary)
        self.discard_stopped()
        return state


def _states(folder: Path) -> list[State]:
    found = ((NAME.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return [
        State(int(match["steps"]), match["how"] == "finished", path, int(match["wanted"]) if match["wanted"] else None)
        for match, path in found
        if match
    ]


def _how(state: State) -> str:
    return "ended" if state.is_finished else "was stopped"


def _end(state: State) -> str:
    return f"{_how(state)} at step {state.steps}"


def _remove_old(folder: Path, newest: Path) -> None:
    """Keep the newest states, up to KEPT_STATES and KEPT_BYTES. `newest` was just written.

    States of the last hour stay: a running training, here or on another machine, may need them.
    """
    now = newest.stat().st_mtime  # the file system's clock can differ from this machine's
    files = []
    for state in _states(folder):
        with contextlib.suppress(OSError):  # another process removed it
            status = state.path.stat()
            files.append((status.st_mtime, status.st_size, state.path))
    total = 0
    for index, (changed, size, path) in enumerate(sorted(files, reverse=True)):
        total += size
        if (index >= KEPT_STATES or total > KEPT_BYTES) and now - changed > IN_USE_SECONDS:
            with contextlib.suppress(OSError):
                path.unlink()
