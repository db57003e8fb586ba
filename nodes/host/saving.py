"""Save adapters in `models/sa_inject`: nothing is overwritten, nothing is saved twice, nothing is lost."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ...core.adapter import Adapter
from ...core.adapter_file import adapter_bytes, holds_adapter, load_adapter, save_adapter
from ...core.atomic_write import NameTakenError
from ...core.file_names import name_problem
from ...core.layers import SelfAttentionLayer
from .files import EXTENSION, FOLDER, adapter_folder
from .provenance import Provenance, file_metadata

log = logging.getLogger(__name__)

METADATA_BYTES = 2**19  # reserved for the thumbnail and the workflow
CHUNK = 2**20


class Saved(NamedTuple):
    adapter: Adapter  # with the name of its file
    text: str  # short text for the node


def wanted_path(file_name: str) -> Path:
    """The path for an adapter of that name, if it is free. Sub-folders and links are allowed.

    Raises ValueError for a name that is empty, leaves the adapter folder, or is not valid on some system.
    """
    name = file_name.strip().replace("\\", "/")
    if name.lower().endswith(EXTENSION):
        name = name[: -len(EXTENSION)]
    parts = name.split("/")
    # The spelling is checked, not the target: a sub-folder may be a link to another disk.
    if re.match("[A-Za-z]:", name) or any(part in ("", ".", "..") for part in parts):
        problem = f"is not a name inside the folder models/{FOLDER}"
    else:
        found = next((found for part in parts if (found := name_problem(part))), None)
        if found is None:
            return adapter_folder().joinpath(*parts[:-1], parts[-1] + EXTENSION)
        problem = f"cannot be used: {found}"
    raise ValueError(
        f"The file name '{file_name}' {problem}. Use letters and digits, with / for a sub-folder, such as 'toys/robot'."
    )


def check_can_save(path: Path, layers: Sequence[SelfAttentionLayer] = (), rank: int = 0) -> None:
    """Check that an adapter of that size can be written next to `path`, by writing and deleting a file.

    Raises OSError with a message that says what to do.
    """
    size = adapter_bytes(layers, rank) + METADATA_BYTES
    made = _missing_folders(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Named as in `atomic_write`, so that it is deleted after a crash.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=".part") as file:
            for start in range(0, size, CHUNK):
                file.write(os.urandom(min(CHUNK, size - start)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"An adapter of {size / 1e6:.1f} MB cannot be saved to {path.parent} ({error.strerror or error}). "
            f"Make room, allow writing there, or choose another file_name: one without / goes to {adapter_folder()}."
        ) from error
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # it was never created, or is already in use
                break


def save_new_adapter(adapter: Adapter, path: Path, provenance: Provenance) -> Saved:
    """Save to `path`, with a number if the name is taken. A file that already holds this adapter is used.

    The name is chosen and created in one step, so that no file is overwritten. Raises OSError.
    """
    for existing in _files_named(path):
        if holds_adapter(existing, adapter):
            log.info("%s holds this adapter already.", existing)
            return Saved(load_adapter(existing), f"{existing.name} holds this adapter already")
    for free in (candidate for candidate in _numbered(path) if not candidate.exists()):
        try:
            save_adapter(adapter, free, file_metadata(adapter, free.stem, provenance), replace=False)
        except NameTakenError:
            continue  # another process created it
        log.info("Saved adapter %s (%.1f MB).", free, free.stat().st_size / 1e6)
        return Saved(dataclasses.replace(adapter, name=free.stem), f"saved {free.name}")
    raise AssertionError("numbers never end")


def save_or_rescue(adapter: Adapter, path: Path, provenance: Provenance) -> Saved:
    """Save. If that fails, save to the host's temporary folder and say where. Never raises OSError."""
    try:
        return save_new_adapter(adapter, path, provenance)
    except OSError as error:
        log.exception("The adapter could not be saved to %s.", path)
        why = str(error)
    rescue = Path(folder_paths.get_temp_directory()) / FOLDER / path.name
    try:
        adapter, _ = save_new_adapter(adapter, rescue, provenance)
    except OSError:
        log.exception("Nor could it be saved to %s.", rescue)
        return Saved(adapter, f"NOT SAVED ({why}); connect Save SA-Inject Adapter to the adapter output")
    kept = rescue.with_name(adapter.name + EXTENSION)
    text = (
        f"NOT SAVED to models/{FOLDER} ({why}), but to {kept}: move it before ComfyUI ends, which empties that folder"
    )
    log.warning("%s.", text)
    return Saved(adapter, text)


def existing_files(file_name: str) -> list[tuple[str, int]]:
    """The files of that name, with any number, and the times of their last changes."""
    return [(path.name, path.stat().st_mtime_ns) for path in _files_named(wanted_path(file_name))]


def _numbered(path: Path) -> Iterator[Path]:
    """robot, robot_00002, robot_00003, ..."""
    numbers = (path.with_name(f"{path.stem}_{number:05}{path.suffix}") for number in itertools.count(2))
    return itertools.chain([path], numbers)


def _files_named(path: Path) -> list[Path]:
    """The existing files of `_numbered`, gaps allowed."""
    ours = re.compile(rf"{re.escape(path.stem)}(_\d{{5,}})?{re.escape(path.suffix)}")
    try:
        return sorted(file for file in path.parent.iterdir() if ours.fullmatch(file.name))
    except OSError:
        return []


def _missing_folders(folder: Path) -> list[Path]:
    """The missing folders of a path, the deepest first."""
    return list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
