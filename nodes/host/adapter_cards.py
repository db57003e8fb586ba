"""Cards of adapter files for the browser: checked values from their headers, which are cached."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ...core.adapter_file import adapter_metadata
from ...core.adapter_metadata import FORMAT_VERSION, UnusableMetadataError, from_metadata, shortened
from .files import EXTENSION, adapter_names, adapter_path

MOST_HEADER = 16 * 2**20  # bytes; files with a larger header get no card
STEPS_FOLDER = ".training"  # follows the adapter's name: the folder of its training, with earlier steps
KEPT = re.compile(r"\d+(?=\.safetensors$)")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")  # also changes of direction

Card = dict[str, Any]
State = tuple[int, int]
_cards: dict[Path, tuple[State, Card]] = {}


def adapter_cards() -> list[Card]:
    """A card for every listed adapter. The first call reads all headers, later calls only those of changed files."""
    return [card for name in adapter_names() if (card := _card(name)) is not None]


def adapter_card(name: str) -> Card | None:
    """The card of a listed file, with its kept steps. None for a name that the host does not list."""
    names = adapter_names()
    if name not in names:
        return None
    card = _card(name)
    return card and {**card, "kept": kept_steps(name, names)}


def listed_metadata(name: str) -> dict[str, str] | None:
    """The metadata of a listed adapter file, else None."""
    if name not in adapter_names():
        return None
    try:
        path = adapter_path(name)
        return adapter_metadata(path) if _header_size(path) <= MOST_HEADER else None
    except OSError:
        return None


def kept_steps(name: str, names: list[str]) -> list[dict[str, Any]]:
    """Adapters that the training of `name` saved at earlier steps, in order."""
    folder = name.removesuffix(EXTENSION) + STEPS_FOLDER
    inside = [other for other in names if other.replace("\\", "/").startswith(folder.replace("\\", "/") + "/")]
    steps = [{"step": int(found[0]), "name": other} for other in inside if (found := KEPT.search(other))]
    return sorted(steps, key=lambda kept: kept["step"])


def _card(name: str) -> Card | None:
    try:
        path = adapter_path(name)
        found = os.stat(path)
        state = found.st_mtime_ns, found.st_size
        known = _cards.get(path)
        if known is None or known[0] != state:
            known = _cards[path] = state, _read(path)
    except OSError:  # deleted, or not readable
        return None
    return {"name": name, "version": f"{state[0]:x}-{state[1]:x}", "bytes": state[1], **known[1]}


def _read(path: Path) -> Card:
    if _header_size(path) > MOST_HEADER:
        return {"error": "its header is larger than that of any adapter"}
    metadata = adapter_metadata(path)
    if metadata is None:
        return {"error": "it is not an SA-Inject adapter"}
    if (version := metadata.get("format_version", "none")) != FORMAT_VERSION:
        return {"error": f"it has format version {_text(version)}; this pack reads version {FORMAT_VERSION}"}
    try:
        info = from_metadata(metadata)
    except (KeyError, UnusableMetadataError) as error:
        return {"error": f"its metadata cannot be used ({_text(error)})"}
    return {
        "placeholder_token": _text(info.placeholder_token),
        "class_word": _text(info.class_word),
        "architecture": _text(info.architecture),
        "reference_mode": info.reference_mode,
        "rank": info.rank,
        "steps": _whole(info.training.get("steps")),
        "resolution": _whole(info.training.get("resolution")),
        "date": _text(metadata.get("date", ""))[:10],
        "thumbnail": bool(metadata.get("modelspec.thumbnail")),
    }


def _header_size(path: Path) -> int:
    """The header's length, from the first bytes of a safetensors file."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def _text(value: Any) -> str:
    return CONTROL.sub("", shortened(value))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None
