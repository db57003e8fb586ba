"""Keeps long training fast on a shared machine, and leaves other programs their cores.

PyTorch splits every operation evenly over its threads, so a thread that waits for a busy core slows all of them. Beside
another busy program, one thread per free core is several times faster than one per core.
"""

import os
import time
from pathlib import Path

import torch

STAT: Path = Path("/proc/stat")


class FreeCores:
    """Sets PyTorch's number of threads to that of free cores, up to OMP_NUM_THREADS."""

    def __init__(self, interval: float = 2.0):
        self._interval = interval
        self._cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self._previous = (time.monotonic(), self._busy())
        torch.set_num_threads(self._cores)

    def _busy(self) -> float:
        """Processor seconds of all programs at ordinary priority."""
        if not STAT.exists():
            return 0.0
        user, _, system = (int(field) for field in STAT.read_text().split()[1:4])
        return (user + system) / os.sysconf("SC_CLK_TCK")

    def adjust(self) -> None:
        """Call between steps."""
        now = time.monotonic()
        since, before = self._previous
        if now - since < self._interval:
            return
        busy = self._busy()
        self._previous = (now, busy)
        taken = round((busy - before) / (now - since) - 0.15)
        threads = max(1, self._cores - max(0, taken))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
