"""Find the architecture of a listed checkpoint from its header, without reading tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import folder_paths
import torch
from comfy import model_detection

from .unet import FAMILIES

FOLDERS = ("checkpoints", "diffusion_models")
MOST_HEADER = 100 * 2**20

_kinds: dict[Path, tuple[tuple[int, int], str | None]] = {}


def architecture_of(folder: str, name: str) -> str | None:
    """The architecture, such as "SD1.x". None if the file is not listed, no safetensors file, or unknown."""
    if folder not in FOLDERS or not name.endswith(".safetensors") or name not in folder_paths.get_filename_list(folder):
        return None
    try:
        path = Path(folder_paths.get_full_path_or_raise(folder, name))
        found = os.stat(path)
        state = found.st_mtime_ns, found.st_size
        known = _kinds.get(path)
        if known is None or known[0] != state:
            known = _kinds[path] = state, _architecture(path)
        return known[1]
    except (OSError, ValueError):
        return None


def _architecture(path: Path) -> str | None:
    shapes = _shapes(path)
    prefix = model_detection.unet_prefix_from_state_dict(shapes)
    config = model_detection.model_config_from_unet(shapes, prefix)
    if config is None or "model_channels" not in config.unet_config:  # no UNet: the others are not told apart
        return None
    width = config.unet_config.get("context_dim")
    return FAMILIES[width] if width in FAMILIES else type(config).__name__


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the file on `meta`, without values."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER:
            raise ValueError("no header of a checkpoint")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {key: torch.empty(entry["shape"], device="meta") for key, entry in header.items()}
