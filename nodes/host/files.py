"""Where adapters live in a ComfyUI installation, and how a trained one gets there."""

from __future__ import annotations

import base64
import datetime
import io as bytes_io
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args as host_arguments
from PIL import Image
from torch import Tensor

from ...core.adapter import Adapter
from ...core.adapter_file import load_adapter, save_adapter
from .extra_paths import default_model_paths
from .images import center_crop, resized, to_comfy

log = logging.getLogger(__name__)

FOLDER = "sa_inject"
EXTENSION = ".safetensors"
THUMBNAIL_SIDE = 256
MODELSPEC_ARCHITECTURES = {
    "SD1.x": "stable-diffusion-v1/sa-inject",
    "SD2.x": "stable-diffusion-v2/sa-inject",
    "SDXL": "stable-diffusion-xl-v1-base/sa-inject",
    "SDXL refiner": "stable-diffusion-xl-v1-refiner/sa-inject",
}


def register_folder() -> None:
    """Tell ComfyUI about `models/sa_inject`. New adapters go there, unless the user made another folder the default."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True)
    for path in default_model_paths(FOLDER):
        folder_paths.add_model_folder_path(FOLDER, path, is_default=True)
    folder_paths.folder_names_and_paths[FOLDER][1].add(EXTENSION)  # a new name has none, which would list every file


def adapter_names() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def adapter_path(name: str) -> Path:
    """Full path of a listed adapter. Raises FileNotFoundError when it is gone."""
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def read_adapter(name: str) -> Adapter:
    return load_adapter(adapter_path(name))


def adapter_folder() -> Path:
    """Where new adapters go."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0]).resolve()


def new_adapter_path(file_name: str) -> Path:
    """A free path for a new adapter: a number is added rather than a file overwritten.

    Sub-folders are allowed. Raises ValueError for a name that is empty or leaves the adapter folder.
    """
    folder = adapter_folder()
    stem = file_name.strip().replace("\\", "/").removesuffix(EXTENSION)
    path = (folder / stem).resolve()
    if not stem or stem.endswith("/") or Path(stem).is_absolute() or folder not in path.parents or ":" in stem:
        raise ValueError(
            f"The file name '{file_name}' is not a name inside the folder models/{FOLDER}. "
            "Use letters and digits, with / for a sub-folder, such as 'toys/robot'."
        )
    candidates = itertools.chain([path.name], (f"{path.name}_{number:05}" for number in itertools.count(2)))
    return next(free for name in candidates if not (free := path.with_name(name + EXTENSION)).exists())


def save_trained(
    adapter: Adapter, path: Path, prompt: Any, extra_pnginfo: Any, thumbnail: Tensor, version: str
) -> str | None:
    """Save an adapter with the workflow that made it. Returns why it could not be saved, or None.

    thumbnail (1, 3, h, w) in 0..1. A full disk or a read-only folder is reported and not raised: the training is done
    and its result must stay usable.
    """
    try:
        save_adapter(adapter, path, _metadata(adapter, path, prompt, extra_pnginfo, thumbnail, version))
    except OSError as error:
        log.exception("The adapter could not be saved to %s.", path)
        return str(error)
    log.info("Saved adapter %s (%.1f MB).", path, path.stat().st_size / 1e6)
    return None


def _metadata(
    adapter: Adapter, path: Path, prompt: Any, extra_pnginfo: Any, thumbnail: Tensor, version: str
) -> dict[str, str]:
    info = adapter.info
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    metadata = {
        "sa_inject_version": version,
        "seed": str(info.training.get("seed", "")),
        "date": date,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": MODELSPEC_ARCHITECTURES.get(info.architecture, info.architecture),
        "modelspec.implementation": "https://github.com/sa-inject/sa-inject",
        "modelspec.title": path.stem,
        "modelspec.date": date,
        "modelspec.trigger_phrase": f"{info.placeholder} {info.class_word}".strip(),
        "modelspec.resolution": "{0}x{0}".format(info.training.get("resolution", "")),
        "modelspec.prediction_type": str(info.training.get("prediction_type", "")),
        "modelspec.thumbnail": _thumbnail(thumbnail),
    }
    if not host_arguments.disable_metadata:
        metadata["prompt"] = json.dumps(prompt)
        metadata.update({key: json.dumps(value) for key, value in (extra_pnginfo or {}).items()})
    return metadata


def _thumbnail(picture: Tensor) -> str:
    h, w = picture.shape[-2:]
    ratio = THUMBNAIL_SIDE / min(h, w)
    square = center_crop(resized(picture, round(h * ratio), round(w * ratio)), THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    file = bytes_io.BytesIO()
    to_pil(square).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def to_pil(picture: Tensor) -> Image.Image:
    """(1, 3, h, w) in 0..1 -> a PIL image"""
    return Image.fromarray((to_comfy(picture)[0].clamp(0, 1) * 255).round().byte().cpu().numpy())
