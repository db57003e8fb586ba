"""Trainings that are killed, cancelled, or run out of memory or disk at random moments must end with the same result.

    python dev.py bench interruptions            20 kills, 10 cancels, 10 times no memory, 5 times no disk
    python dev.py bench interruptions --quick    one of each

A tiny SD1.5 with random weights, float32, with samples, validation and saved states. The bits of the adapter
are compared. Every training is interrupted up to three times, in processes of their own. Cancels go through the
/interrupt of a server. The system must be able to fork, as Linux is.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..report import Row, environment, print_json, publish
from . import disturbances, process
from .cancels import cancelled
from .training import STEPS, trainer_on

DISTURBANCES = {
    "no memory, once": disturbances.memory_that_fails_once,
    "no memory any more": disturbances.memory_that_stays_short,
    "no disk, then a cancel": disturbances.full_disk,
}
TIMES = {"kill -9": 20, "POST /interrupt": 10, **dict.fromkeys(DISTURBANCES, 5)}
IN_ONE_TRAINING = 3
COLUMNS = ("interruption", "times", "trainings finished", "bit-equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)  # in this process, on this base directory
    parser.add_argument("--kill-at-step", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.train_in:
        train = trainer_on(options.train_in)
        if options.kill_at_step is not None:
            disturbances.kill_at(train, options.kill_at_step, partial(os.kill, os.getpid(), signal.SIGKILL))
        print_json({"digest": train()})
        return
    if not hasattr(os, "fork"):
        sys.exit("This bench forks its trainings, which this system cannot.")
    print_json(bench(options.quick, random.Random(options.seed)))


def bench(quick: bool, chance: random.Random) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)  # a process with threads cannot be forked
    times = dict.fromkeys(TIMES, 1) if quick else TIMES
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sa-inject-interruptions-", ignore_cleanup_errors=True) as folder:
        base = Path(folder) / "here"
        interrupted = Interrupted(base, chance)
        rows = [interrupted.by_kills(times["kill -9"])]
        _show(rows)
        for name, disturb in DISTURBANCES.items():
            rows.append(interrupted.by(name, disturb, times[name]))
            _show(rows)
        rows.insert(1, cancelled(Path(folder) / "server", times["POST /interrupt"], chance))
    result = {
        "bench": "interruptions",
        "steps": STEPS,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "environment": environment(),
        "rows": rows,
    }
    publish("interruptions", "Trainings that were interrupted", "cpu", result, COLUMNS, quick)
    return result


class Interrupted:
    """Trainings on one host, each step of them in a process of its own."""

    def __init__(self, base: Path, chance: random.Random) -> None:
        self._base, self._chance = base, chance
        self._train = trainer_on(base)
        begun = time.monotonic()
        self._expected = process.run(self._train)
        self._seconds = time.monotonic() - begun
        self._forget()

    def by_kills(self, times: int) -> Row:
        """Killed at a random moment, up to three times; then left to come to its end."""

        def interrupt() -> str | None:
            return process.run(self._train, kill_after=self._chance.uniform(0.05, 0.6) * self._seconds)

        return self._row("kill -9", times, interrupt, may_miss=True)

    def by(self, name: str, disturb: Callable[[Callable[[], str], int], str | None], times: int) -> Row:
        """Disturbed at random steps."""

        def interrupt() -> str | None:
            step = self._chance.randrange(1, STEPS + 1)
            return process.run(lambda: disturb(self._train, step) or "") or None

        return self._row(name, times, interrupt, may_miss=False)

    def _row(self, name: str, times: int, interrupt: Callable[[], str | None], may_miss: bool) -> Row:
        """may_miss: whether a training that comes to its end was not interrupted."""
        happened = finished = equal = 0
        while happened < times or finished == 0:
            found: str | None = None
            for _ in range(min(IN_ONE_TRAINING, times - happened)):
                found = interrupt()
                happened += found is None or not may_miss
                if found is not None:
                    break
            finished += 1
            equal += (found or process.run(self._train)) == self._expected
            self._forget()
        return {"interruption": name, "times": happened, "trainings finished": finished, "bit-equal": equal}

    def _forget(self) -> None:
        shutil.rmtree(self._base / "models" / "sa_inject", ignore_errors=True)


def _show(rows: list[Row]) -> None:
    print(f"  {rows[-1]}", flush=True)
