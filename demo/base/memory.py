"""Freed memory is kept rather than returned to the system: page faults would halve the speed of training."""

import os
import sys

MALLOC: dict[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def keep_freed_memory(module: str, commands: tuple[str, ...]) -> None:
    """Start this program once more with the settings, if it is to do one of the commands: libc reads them only then."""
    if sys.argv[1:2] and sys.argv[1] in commands and not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **MALLOC})
