"""Atomic file writes: a file is complete, or it is not there."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

PARTIAL = re.compile(r"\..*-[a-z0-9_]{8}\.part")  # names of files that are being written
ABANDONED_AFTER = 24 * 3600.0  # seconds without a change


class NameTakenError(OSError):
    """The file name is already taken."""


@contextlib.contextmanager
def atomic_write(path: Path, replace: bool = True) -> Generator[Path]:
    """Yield a temporary path. It is renamed to `path` if the block succeeds; otherwise `path` is unchanged.

    Raises OSError if the folder cannot be written; nothing is left behind. Without `replace`, an existing file is kept
    and NameTakenError is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        _remove_abandoned(path.parent, now=temporary.stat().st_mtime)
        yield temporary
        with contextlib.suppress(OSError):  # some network drives have no file modes
            temporary.chmod(0o644)  # mkstemp gives access to the owner only
        if replace:
            os.replace(temporary, path)
        else:
            _move_to_free_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_free_name(temporary: Path, path: Path) -> None:
    """Rename in one step that cannot replace a file. Raises NameTakenError."""
    try:
        if os.name == "nt":
            os.rename(temporary, path)  # fails on Windows if the name is taken
            return
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: exFAT, and some that are shared
            _replace_own_empty_file(temporary, path)
    except FileExistsError as error:
        raise NameTakenError(error.errno, "There is a file of that name already", str(path)) from error


def _replace_own_empty_file(temporary: Path, path: Path) -> None:
    """Create an empty file of that name, which only one process can do, and replace it."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.replace(temporary, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _remove_abandoned(folder: Path, now: float) -> None:
    """Delete unfinished files of processes that were killed. `now` is the time of the file system."""
    with contextlib.suppress(OSError):  # another process may delete it first; some folders cannot be listed
        for path in folder.iterdir():
            if PARTIAL.fullmatch(path.name) and now - path.stat().st_mtime > ABANDONED_AFTER:
                path.unlink(missing_ok=True)
