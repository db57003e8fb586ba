"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the name `path` when the block ends well; else `path` stays as it was.

    Raises OSError when the folder cannot be written; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with contextlib.suppress(OSError):  # some network drives have no rights to set
            temporary.chmod(0o644)  # mkstemp keeps its file to its owner
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
