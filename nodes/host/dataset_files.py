"""Which files of a folder inside ComfyUI's `input` are pictures, captions and masks.

`name.txt` is the caption of `name.jpg`. `name-masklabel.png` (OneTrainer) or `name_mask.png` is its mask. Pictures in
sub-folders such as `10_name` (kohya) are included.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import folder_paths

from .picture_file import EXTENSIONS, UNSUPPORTED, shown

log = logging.getLogger(__name__)

MASK_ENDINGS = ("-masklabel", "_mask")
OTHER_ENDINGS = ("-condlabel",)  # OneTrainer's: neither picture nor mask
CAPTION_EXTENSIONS = (".txt", ".caption")
KOHYA_FOLDER = re.compile(r"\d+_.+")
DEEPEST, MOST_FOLDERS = 6, 2000  # limits of the list to choose from: `input` may contain a link to a whole disk


class Entry(NamedTuple):
    """The files of one picture."""

    picture: Path
    caption: Path | None
    mask: Path | None


def dataset_folders() -> list[str]:
    """Paths of the folders inside `input`, with / as separator. Links are followed."""
    found: list[str] = []
    root = Path(folder_paths.get_input_directory())
    pending, seen = [(root, 0)], {os.path.realpath(root)}
    while pending and len(found) < MOST_FOLDERS:
        folder, depth = pending.pop()
        for child in children(folder):
            real = os.path.realpath(child)
            if is_hidden(child.name) or not os.path.isdir(child) or real in seen or child.name != shown(child.name):
                continue
            seen.add(real)
            found.append(child.relative_to(root).as_posix())
            if depth + 1 < DEEPEST:
                pending.append((child, depth + 1))
    return sorted(found, key=natural_order)


def dataset_folder(name: str) -> Path:
    """The folder of that name. Raises ValueError if it does not exist or is outside of `input`.

    Only the spelling of the path is checked. A link inside `input` may lead elsewhere, as everywhere in ComfyUI.
    """
    root = os.path.abspath(folder_paths.get_input_directory())
    missing = (
        f"There is no folder '{shown(name)}' inside {root}. Choose another one; press R in the browser to list it."
    )
    for spelling in (name, name.replace("\\", "/")):  # the second for workflows saved on Windows
        if not name.strip() or "\0" in name or ".." in re.split(r"[\\/]", name) or os.path.isabs(spelling):
            raise ValueError(missing)
        path = os.path.abspath(os.path.join(root, spelling))
        if path != root and path.startswith(os.path.join(root, "")) and os.path.isdir(path):
            return Path(path)
    raise ValueError(missing)


def dataset_fingerprint(name: str) -> str:
    """A fingerprint of names and contents of all files that are used, without their times."""
    try:
        entries = list_entries(dataset_folder(name))
    except ValueError:
        return "missing"
    digest = hashlib.blake2b()
    for entry in entries:
        for path in entry:
            if path is None:
                digest.update(b"none")
                continue
            digest.update(path.name.encode("utf-8", "surrogateescape"))
            try:
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                digest.update(str(error.errno).encode())
    return digest.hexdigest()


def list_entries(folder: Path) -> list[Entry]:
    """The pictures of a folder and its kohya sub-folders, with captions and masks."""
    entries = _entries_of(folder)
    for child in sorted(children(folder), key=lambda path: natural_order(path.name)):
        if KOHYA_FOLDER.fullmatch(child.name) and os.path.isdir(child):
            entries += _entries_of(child)
    return entries


def natural_order(name: str) -> tuple:
    """Sort key: 2 before 10, upper and lower case together, and the same on every system."""
    plain = unicodedata.normalize("NFC", name)
    parts = re.split(r"([0-9]+)", plain.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], plain


def _entries_of(folder: Path) -> list[Entry]:
    files = [path for path in children(folder) if not is_hidden(path.name) and os.path.isfile(path)]
    files.sort(key=lambda path: natural_order(path.name))
    by_name = {_folded(path.name): path for path in files}
    masks, pictures = {}, []
    for path in files:
        suffix, stem = path.suffix.lower(), _folded(path.stem)
        ending = next((ending for ending in (*MASK_ENDINGS, *OTHER_ENDINGS) if stem.endswith(ending)), None)
        if suffix not in EXTENSIONS | UNSUPPORTED:
            continue
        if ending is None:
            pictures.append(path)
        elif ending in MASK_ENDINGS:
            masks.setdefault(stem.removesuffix(ending), path)
    unused = {_folded(path.stem) for path in pictures}
    for stem in masks.keys() - unused:
        log.warning("'%s' is a mask, but there is no picture for it.", shown(masks[stem].name))
    return [Entry(path, _caption_of(path, by_name), masks.get(_folded(path.stem))) for path in pictures]


def _caption_of(picture: Path, by_name: dict[str, Path]) -> Path | None:
    names = (stem + extension for extension in CAPTION_EXTENSIONS for stem in (picture.stem, picture.name))
    return next((by_name[_folded(name)] for name in names if _folded(name) in by_name), None)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, or one of macOS or Windows such as ._name.jpg."""
    return name.startswith((".", "__MACOSX")) or name.lower() in ("thumbs.db", "desktop.ini")


def children(folder: Path) -> Iterator[Path]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        log.warning("The folder %s cannot be read: %s", shown(str(folder)), error.strerror)
        return
    for name in names:
        yield folder / name
