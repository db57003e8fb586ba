"""Trainings in processes of their own. They are forked, so that the host is imported only once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable


def run(work: Callable[[], str], kill_after: float | None = None) -> str | None:
    """Work in another process. -> what it returns, or None where it was killed after so many seconds

    Raises RuntimeError where it failed. What it prints is printed here.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            os.write(writing, work().encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    try:
        if kill_after is not None:
            _kill(child, kill_after)
        with os.fdopen(reading) as pipe:
            result = pipe.read()
    finally:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        raise RuntimeError(f"a training's process ended with status {status}")
    return result


def _kill(child: int, after: float) -> None:
    """Kill it then, unless it has ended before."""
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
