"""Measurement of seconds and memory, for all benches."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: "5" resets the high-water mark of the resident set
STATUS = Path("/proc/self/status")
SAMPLING_SECONDS = 0.005
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # as torch's profiler calls it


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def kernel_seconds(run: Callable[[], object]) -> float:
    """Seconds in which the CUDA device is busy during a run.

    This is close to the total time if the device is the bottleneck. With a large device and a slow processor, the total
    time is mostly that of launching kernels from Python.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronise()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return sum(event["dur"] for event in events if event.get("cat") in DEVICE_WORK) / 1e6


def alternate(
    plain: Callable[[], object], other: Callable[[], object], repeats: int, warm_ups: int = 1
) -> tuple[list[float], list[float]]:
    """Time A and B in turn, A B, B A, A B, ..., so that a drift affects both."""
    for _ in range(warm_ups):
        plain()
        other()
    a: list[float] = []
    b: list[float] = []
    for repeat in range(repeats):
        pair = [(a, plain), (b, other)]
        for times, run in pair if repeat % 2 == 0 else reversed(pair):
            times.append(seconds_of(run))
    return a, b


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(of) / statistics.median(to)


def spread(values: Sequence[float]) -> float:
    """The spread of the repeats, (max - min) / median: the resolution of a ratio."""
    return (max(values) - min(values)) / statistics.median(values)


class StepClock:
    """Notes when each step of the host's progress bar is done. `with StepClock() as clock: run()`

    waits: whether each step waits until the device is done. Otherwise, on CUDA, only the total time is exact, and
    Python runs ahead of the device as in ordinary use.
    """

    def __init__(self, waits: bool = True) -> None:
        self._waits = waits

    def __enter__(self) -> StepClock:
        import comfy.utils

        self.stamps: list[float] = []
        comfy.utils.set_progress_bar_global_hook(self._note)
        synchronise()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        import comfy.utils

        synchronise()
        self.stop = time.perf_counter()
        comfy.utils.set_progress_bar_global_hook(None)

    def _note(self, *_: object, **__: object) -> None:
        if self._waits:
            synchronise()
        self.stamps.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds of each step. The first includes all that came before it."""
        return [b - a for a, b in zip([self.start, *self.stamps], self.stamps, strict=False)]

    def after(self) -> float:
        """Seconds from the last step to the end."""
        return self.stop - self.stamps[-1]


class Peak:
    """`before` and `peak` in bytes: of CUDA's allocator, or without CUDA of the process's resident set."""

    before = 0
    peak = 0

    @property
    def added(self) -> int:
        return self.peak - self.before


@contextmanager
def peak_memory():
    gc.collect()
    result = Peak()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        result.before = torch.cuda.memory_allocated()
        yield result
        torch.cuda.synchronize()
        result.peak = torch.cuda.max_memory_allocated()
        return
    result.before = resident()
    with _resident_peak(result):
        yield result


@contextmanager
def _resident_peak(result: Peak):
    if sys.platform == "linux" and _reset_high_water_mark():
        yield
        result.peak = _high_water_mark()
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            result.peak = max(result.peak, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def resident() -> int:
    return psutil.Process().memory_info().rss


def _reset_high_water_mark() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def live_tensor_bytes() -> int:
    """Bytes of all tensors that Python still holds, each storage counted once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type != "meta":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
