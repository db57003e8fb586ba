"""Freed memory is kept for reuse and not returned to the system: page faults would halve the speed of training."""

import os
import sys

MALLOC: dict[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def keep_freed_memory(module: str, commands: tuple[str, ...]) -> None:
    """Restart this program with these settings if it runs one of the commands. libc reads them only at its start."""
    if sys.argv[1:2] and sys.argv[1] in commands and not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **MALLOC})
