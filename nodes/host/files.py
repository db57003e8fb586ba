"""The folder of the adapters in a ComfyUI installation."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...core.adapter import Adapter
from ...core.adapter_file import load_adapter
from .extra_paths import default_model_paths

FOLDER = "sa_inject"
EXTENSION = ".safetensors"


def register_folder() -> None:
    """Register `models/sa_inject`. New adapters go there, unless the user has set another default folder."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True)
    for path in default_model_paths(FOLDER):
        folder_paths.add_model_folder_path(FOLDER, path, is_default=True)
    folder_paths.folder_names_and_paths[FOLDER][1].add(EXTENSION)  # without it the host lists every file


def adapter_names() -> list[str]:
    try:
        return folder_paths.get_filename_list(FOLDER)
    except FileNotFoundError:  # a sub-folder in the host's cache was deleted
        folder_paths.filename_list_cache.pop(FOLDER, None)
        return folder_paths.get_filename_list(FOLDER)


def adapter_path(name: str) -> Path:
    """Full path of a listed adapter. Raises FileNotFoundError if it was deleted."""
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def read_adapter(name: str) -> Adapter:
    return load_adapter(adapter_path(name))


def adapter_folder() -> Path:
    """The folder for new adapters."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0]).absolute()
