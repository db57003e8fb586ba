"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

PARTIAL = re.compile(r"\..*-[a-z0-9_]{8}\.part")  # what `atomic_write` calls a file while it is written
ABANDONED_AFTER = 24 * 3600.0  # seconds in which no writer touched it


class NameTakenError(OSError):
    """A file of that name was there first."""


@contextlib.contextmanager
def atomic_write(path: Path, replace: bool = True) -> Iterator[Path]:
    """A file to write to, which takes the name `path` when the block ends well; else `path` stays as it was.

    Raises OSError when the folder cannot be written; nothing is left behind then. With `replace` false, a file that
    has the name by then is left alone, and NameTakenError is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        _remove_abandoned(path.parent, now=temporary.stat().st_mtime)
        yield temporary
        with contextlib.suppress(OSError):  # some network drives have no rights to set
            temporary.chmod(0o644)  # mkstemp keeps its file to its owner
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
            os.rename(temporary, path)  # which refuses a name that is taken, there only
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
    """Take the name with an empty file, which only one can create, and put the whole one in its place."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.replace(temporary, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _remove_abandoned(folder: Path, now: float) -> None:
    """Delete what processes that were killed left half written. `now` is the file system's clock, not ours."""
    with contextlib.suppress(OSError):  # another process may be at it, and not every folder may be listed
        for path in folder.iterdir():
            if PARTIAL.fullmatch(path.name) and now - path.stat().st_mtime > ABANDONED_AFTER:
                path.unlink(missing_ok=True)
