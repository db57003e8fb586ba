"""How an adapter gets a file in `models/sa_inject`: no file is replaced, none is written twice, and none is lost."""

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
    adapter: Adapter  # under the name of its file
    text: str  # what is to be told of it, in a few words


def wanted_path(file_name: str) -> Path:
    """Where an adapter of that name goes if the name is free. Sub-folders are allowed, links among them.

    Raises ValueError for a name that is empty, leaves the adapter folder, or is impossible on some system.
    """
    name = file_name.strip().replace("\\", "/")
    if name.lower().endswith(EXTENSION):
        name = name[: -len(EXTENSION)]
    parts = name.split("/")
    # By its spelling and not by where it leads: a sub-folder may be a link to another disk.
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
    """Find out whether an adapter of that size can be written beside `path`, by writing as much. Nothing stays.

    Raises OSError, which says what to do.
    """
    size = adapter_bytes(layers, rank) + METADATA_BYTES
    made = _missing_folders(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # As `atomic_write` calls it, so that it is cleaned up after a crash.
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
            except OSError:  # it never came to be, or somebody uses it already
                break


def save_new_adapter(adapter: Adapter, path: Path, provenance: Provenance) -> Saved:
    """Save to `path`, or with a number added where that name is taken. A file that holds the adapter already is used.

    The name is chosen and taken in one step, so that no file is replaced, whoever else writes there. Raises OSError.
    """
    for existing in _files_named(path):
        if holds_adapter(existing, adapter):
            log.info("%s holds this adapter already.", existing)
            return Saved(load_adapter(existing), f"{existing.name} holds this adapter already")
    for free in (candidate for candidate in _numbered(path) if not candidate.exists()):
        try:
            save_adapter(adapter, free, file_metadata(adapter, free.stem, provenance), replace=False)
        except NameTakenError:
            continue  # it came meanwhile
        log.info("Saved adapter %s (%.1f MB).", free, free.stat().st_size / 1e6)
        return Saved(dataclasses.replace(adapter, name=free.stem), f"saved {free.name}")
    raise AssertionError("numbers never end")


def save_or_rescue(adapter: Adapter, path: Path, provenance: Provenance) -> Saved:
    """Save; where that fails, to the host's temporary folder, and say where. Never raises OSError."""
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
    """The files that have the name, numbers included, with the time of their last change."""
    return [(path.name, path.stat().st_mtime_ns) for path in _files_named(wanted_path(file_name))]


def _numbered(path: Path) -> Iterator[Path]:
    """robot, robot_00002, robot_00003, ..."""
    numbers = (path.with_name(f"{path.stem}_{number:05}{path.suffix}") for number in itertools.count(2))
    return itertools.chain([path], numbers)


def _files_named(path: Path) -> list[Path]:
    """What there is of `_numbered`, gaps allowed."""
    ours = re.compile(rf"{re.escape(path.stem)}(_\d{{5,}})?{re.escape(path.suffix)}")
    try:
        return sorted(file for file in path.parent.iterdir() if ours.fullmatch(file.name))
    except OSError:
        return []


def _missing_folders(folder: Path) -> list[Path]:
    """Those on the way that do not exist, the deepest first."""
    return list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
