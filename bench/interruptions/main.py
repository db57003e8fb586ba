"""Trainings that are killed, cancelled, or run out of memory or disk at random moments must end with the same result.

    python dev.py bench interruptions            20 kills, 10 cancels, 5 times no memory, 5 times no disk
    python dev.py bench interruptions --quick    one of each

A tiny SD1.5 with random weights, float32. Samples are drawn, validation is measured, and the state is saved every third
step. The bits of the adapter are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from ..host import CACHE, full_size
from ..report import Row, environment, print_json, publish, run_bench

STEPS = 16
KINDS = {"kill -9": 20, "cancel": 10, "no memory": 5, "no disk": 5}
COLUMNS = ("interruption", "times", "trainings finished", "bit-equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)  # in this process, on this base directory
    parser.add_argument("--kill-after", type=float, help=argparse.SUPPRESS)  # seconds of training
    parser.add_argument("--kill-at-step", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.train_in:
        print_json(train_once(options.train_in, options.kill_after, options.kill_at_step))
        return
    print_json(bench(options.quick, random.Random(options.seed)))


def bench(quick: bool, chance: random.Random) -> dict[str, Any]:
    times = dict.fromkeys(KINDS, 1) if quick else KINDS
    bases = [Path(tempfile.mkdtemp(prefix="sa-inject-interruptions-")) for _ in range(2)]
    try:
        undisturbed, why = run_bench("interruptions", "--train-in", str(bases[0]))
        if undisturbed is None:
            raise SystemExit(f"The undisturbed training failed: {why}")
        rows = [killed(bases[1], times["kill -9"], undisturbed, chance)]
        rows += disturbed_here(bases[1], times, undisturbed["digest"], chance)
    finally:
        for base in bases:
            shutil.rmtree(base, ignore_errors=True)
    result = {"bench": "interruptions", "steps": STEPS, "environment": environment(), "rows": rows}
    publish("interruptions", "Trainings that were interrupted", "cpu", result, COLUMNS, quick)
    return result


def killed(base: Path, times: int, undisturbed: dict[str, Any], chance: random.Random) -> Row:
    """Kill processes at random moments. Each continues a training until it has ended, then starts another."""
    kills, finished, equal = 0, 0, 0
    while kills < times or finished == 0:
        after = [] if kills >= times else ["--kill-after", str(chance.uniform(0.1, 0.7) * undisturbed["seconds"])]
        found, _ = run_bench("interruptions", "--train-in", str(base), *after)
        if found is None:
            kills += 1
            continue
        finished += 1
        equal += found["digest"] == undisturbed["digest"]
        shutil.rmtree(base / "models" / "sa_inject", ignore_errors=True)
    return {"interruption": "kill -9", "times": kills, "trainings finished": finished, "bit-equal": equal}


def disturbed_here(base: Path, times: dict[str, int], expected: str, chance: random.Random) -> list[Row]:
    train = trainer_on(base)
    rows = []
    for kind, disturb in (("cancel", cancelled), ("no memory", without_memory), ("no disk", without_disk)):
        happened = finished = equal = 0
        while happened < times[kind]:
            shutil.rmtree(base / "models" / "sa_inject", ignore_errors=True)
            for step in sorted(chance.sample(range(1, STEPS), min(3, times[kind] - happened))):
                disturb(train, step)
                happened += 1
            finished += 1
            equal += train() == expected
        rows.append({"interruption": kind, "times": happened, "trainings finished": finished, "bit-equal": equal})
    return rows


def cancelled(train: Callable[[], str], step: int) -> None:
    """As POST /interrupt does it."""
    import comfy.model_management as management

    _stopped(train, step, lambda: management.interrupt_current_processing(True))


def without_memory(train: Callable[[], str], step: int) -> None:
    """The folder is missing from this step on, so that the training ends there."""

    def fail() -> None:
        raise MemoryError("injected")

    _stopped(train, step, fail)


def without_disk(train: Callable[[], str], step: int) -> None:
    """From some step on, nothing can be saved. A few steps later the training is cancelled."""
    import comfy.model_management as management
    import torch

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(torch, "save", full):
        _stopped(train, step, lambda: management.interrupt_current_processing(True))


def _stopped(train: Callable[[], str], step: int, happen: Callable[[], None]) -> None:
    """Fail in every step from this one on. A training that is past that step ends without a failure."""
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
            train()
        except BaseException as error:
            if type(error).__name__ not in ("InterruptProcessingException", "MemoryError"):
                raise


def train_once(base: Path, kill_after: float | None, kill_at_step: int | None) -> dict[str, Any]:
    train = trainer_on(base)
    if kill_at_step is not None:
        _stopped(train, kill_at_step, lambda: _kill(0.0))
    if kill_after is not None:
        threading.Thread(target=_kill, args=(kill_after,), daemon=True).start()
    start = time.monotonic()
    return {"digest": train(), "seconds": time.monotonic() - start}


def _kill(after: float) -> None:
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)


def trainer_on(base: Path) -> Callable[[], str]:
    host = full_size().start_host(base, CACHE / "checkpoints")
    host.pack_nodes()
    return trainer(host)


def trainer(host: Any) -> Callable[[], str]:
    """`train()` trains through the node, and resumes if it was stopped. -> a digest of the adapter's bits"""
    import torch

    from sa_inject.nodes.host.drawing import preview

    preview.STEPS = 2
    model, clip, vae = host.load_checkpoint("sd15")
    pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    (settings,) = host.execute("SAInjectTrainingSettings", sample_every=5, validation_every=4, save_every=3)
    small = {"resolution": 64, "steps": STEPS, "rank": 2, "alpha": 2.0, "previews": 0, "file_name": "interrupted"}

    def train() -> str:
        adapter, *_ = host.execute(
            "TrainSAInjectAdapter", model=model, clip=clip, vae=vae, images=pictures, settings=settings, **small
        )
        tensors = {**adapter.lora.state_dict(), **adapter.token_embedding}
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    return train
