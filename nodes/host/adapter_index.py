"""An index of the adapter folder. The header of a file is read again only if the file has changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from ...core.adapter_file import adapter_metadata
from .files import adapter_names, adapter_path
from .words import folded

log = logging.getLogger(__name__)

# The clock of a file system may tick every two seconds. If a file is older than that when it is read, any later change
# also changes its time.
SETTLED = 5.0
CHUNK = 2**20
NAMED = 3  # adapters in a warning

State = tuple[int, ...]


class Subject(NamedTuple):
    """The subject of an adapter file, from its header."""

    word: str | None = None
    training: str | None = None  # fingerprint of its training


_contents: dict[Path, tuple[State, str]] = {}
_subjects: dict[Path, tuple[State, Subject]] = {}


def adapter_fingerprint(name: str | None) -> str:
    """A fingerprint of the file's contents. For None, a name that is not known yet: of every file in the folder.

    Of a file that is no adapter, only the header is read.
    """
    if name is None:
        states = [(name, _state_of(name)) for name in adapter_names()]
        return hashlib.sha256(repr(states).encode()).hexdigest()
    try:
        path = adapter_path(name)
        return _content(path, _state(path))
    except FileNotFoundError:
        return "missing"


def adapters_with_word(word: str, training: str | None = None) -> list[str]:
    """The adapters in the folder with this placeholder token, in any spelling that a prompt finds.

    training: fingerprint of a training whose own adapters are left out.
    """
    subjects = {name: _subject_of(name) for name in adapter_names()}
    return [
        name
        for name, subject in subjects.items()
        if subject.word and folded(subject.word) == folded(word) and (training is None or subject.training != training)
    ]


def warn_of_adapters_with(word: str, training: str) -> None:
    """Warn if adapters of other trainings have the same placeholder token."""
    names = adapters_with_word(word, training)
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        log.warning(
            "The word '%s' is already that of %s%s. In one prompt it can mean only one subject: choose another "
            "placeholder_token, or give Load SA-Inject Adapter another word for one of them.",
            word,
            ", ".join(names[:NAMED]),
            more,
        )


def _content(path: Path, state: State) -> str:
    known = _contents.get(path)
    if known is not None and known[0] == state:
        return known[1]
    if adapter_metadata(path) is None:
        return repr(state)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if _state(path) == state and time.time() - path.stat().st_mtime > SETTLED:
        _contents[path] = state, digest.hexdigest()
    return digest.hexdigest()


def _subject_of(name: str) -> Subject:
    try:
        path = adapter_path(name)
        state = _state(path)
        known = _subjects.get(path)
        if known is None or known[0] != state:
            known = _subjects[path] = state, _subject_in(adapter_metadata(path) or {})
        return known[1]
    except OSError:  # deleted, or not readable
        return Subject()


def _subject_in(metadata: dict[str, str]) -> Subject:
    try:
        training = json.loads(metadata.get("training", "{}"))
    except (ValueError, RecursionError):  # damaged; the error is raised when it is loaded
        training = None
    fingerprint = training.get("fingerprint") if isinstance(training, dict) else None
    return Subject(metadata.get("placeholder"), fingerprint)


def _state_of(name: str) -> State | None:
    try:
        return _state(adapter_path(name))
    except OSError:
        return None


def _state(path: Path) -> State:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
