"""Which folder the user's extra_model_paths.yaml makes the default for a kind of model.

The host puts a default folder first in its list and does not store that it is the default. A pack that adds its own
folder later cannot see it in the list.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import yaml
from comfy.cli_args import args as host_arguments

log = logging.getLogger(__name__)


def default_model_paths(kind: str) -> list[str]:
    """The user's default folders for a kind of model, in the host's order."""
    found = []
    for file in _configuration_files():
        try:
            found += _defaults_in(file, kind)
        except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
            log.warning("%s could not be read (%s); default folders in it are not used.", file, error)
    return found


def _configuration_files() -> Iterator[Path]:
    usual = Path(folder_paths.__file__).resolve().parent / "extra_model_paths.yaml"
    if usual.is_file():
        yield usual
    yield from map(Path, itertools.chain(*(host_arguments.extra_model_paths_config or [])))


def _defaults_in(file: Path, kind: str) -> Iterator[str]:
    sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for section in sections.values():
        if not section or not section.get("is_default") or not section.get(kind):
            continue
        base = os.path.expandvars(os.path.expanduser(section.get("base_path") or ""))
        for line in filter(None, section[kind].split("\n")):
            # Joined as the host does it, so that the paths are equal.
            yield os.path.normpath(os.path.join(file.resolve().parent, base, line))
