"""What trainings have learned, kept on disk: one that was stopped goes on, and one that has ended is not done again.

A state is all that a training needs to go on after some number of steps, so more steps may follow one that has ended.
Which training it belongs to says its fingerprint. States are kept until there are too many of them, see `_remove_old`.
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
SAVE_INTERVAL_SECONDS = 300.0  # what a crash may cost
KEPT_STATES = 10
KEPT_BYTES = 2 * 2**30
IN_USE_SECONDS = 3600.0  # a state as young as this may belong to a training that is running, here or elsewhere


class State(NamedTuple):
    steps: int
    is_finished: bool  # a training ended there, and was not stopped
    path: Path
    wanted: int | None = None  # steps of a training that the user has finished early


class CheckpointError(RuntimeError):
    """A state that cannot be used."""


class TrainingCheckpoint:
    """The states of one training. `resume` before its first step, `on_step` after each, `save` when it ends."""

    def __init__(self, folder: Path, fingerprint: str, save_every: int = 0) -> None:
        """save_every: steps after which to save, besides every few minutes; 0: never"""
        self._save_every = save_every
        self._folder = folder / FOLDER
        self._fingerprint = fingerprint
        self._saved_at = time.monotonic()
        self._current: State | None = None  # where this run came from, or was saved last

    def resume(self, training: Training, steps: int) -> int:
        """Go on from the state with the most steps, up to `steps`. Raises CheckpointError for one that is damaged.

        -> the step at which it ends: `steps`, or an earlier one where the user has finished it early, with the same
        `steps`.
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
        except Exception as error:  # whatever torch.load says of a damaged file
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
        """Save every few minutes and every so many steps, in case the whole program ends."""
        is_due = self._save_every > 0 and len(training.losses) % self._save_every == 0
        if is_due or time.monotonic() - self._saved_at >= SAVE_INTERVAL_SECONDS:
            self.save(training)

    def save(self, training: Training, is_finished: bool = False, wanted: int | None = None) -> None:
        """Write what is learned so far. A full disk is told, not raised: it must not end a training.

        wanted: the number of steps of a training that the user has finished before it.
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
        except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's name for a full disk
            log.warning("What is learned so far could not be kept in %s: %s", state.path, error)

    def discard_stopped(self) -> None:
        """Delete the state that this run saved last or came from, unless a training ended there."""
        if self._current is not None and not self._current.is_finished:
            with contextlib.suppress(OSError):  # another process reads it: too many states, some day, removes it
                self._current.path.unlink(missing_ok=True)
            self._current = None

    def _again(self, state: State) -> State | None:
        """The last state, marked as new, if no step was taken since."""
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
    """Keep the newest states, up to a number and a size. `newest` was written just now.

    Those of the last hour stay in any case: a training that is running, here or on another machine, may need them.
    """
    now = newest.stat().st_mtime  # by the file system's clock, which need not be ours
    files = []
    for state in _states(folder):
        with contextlib.suppress(OSError):  # another process removed it
            status = state.path.stat()
            files.append((status.st_mtime, status.st_size, state.path))
    total = 0
    for place, (changed, size, path) in enumerate(sorted(files, reverse=True)):
        total += size
        if (place >= KEPT_STATES or total > KEPT_BYTES) and now - changed > IN_USE_SECONDS:
            with contextlib.suppress(OSError):
                path.unlink()
