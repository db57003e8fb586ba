"""Metadata of an adapter file for other programs: modelspec entries, a thumbnail, and the workflow."""

from __future__ import annotations

import base64
import datetime
import io as bytes_io
import json
from dataclasses import dataclass
from typing import Any

from comfy.cli_args import args as host_arguments
from PIL import Image
from torch import Tensor

from ...core.adapter import Adapter
from .images import center_crop, resized, to_comfy

THUMBNAIL_SIDE = 256
MODELSPEC_ARCHITECTURES = {
    "SD1.x": "stable-diffusion-v1/sa-inject",
    "SD2.x": "stable-diffusion-v2/sa-inject",
    "SDXL": "stable-diffusion-xl-v1-base/sa-inject",
    "SDXL refiner": "stable-diffusion-xl-v1-refiner/sa-inject",
}


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from: the graph in the host's two formats, the pack's version, and a picture."""

    prompt: Any
    extra_pnginfo: Any
    version: str
    thumbnail: Tensor | None = None  # (1, 3, h, w) in 0..1


def file_metadata(adapter: Adapter, title: str, provenance: Provenance) -> dict[str, str]:
    """Entries for the file's header that the pack itself does not read."""
    info = adapter.info
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    metadata = {
        "sa_inject_version": provenance.version,
        "seed": str(info.training.get("seed", "")),
        "date": date,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": MODELSPEC_ARCHITECTURES.get(info.architecture, info.architecture),
        "modelspec.implementation": "https://github.com/sa-inject/sa-inject",
        "modelspec.title": title,
        "modelspec.date": date,
        "modelspec.trigger_phrase": f"{info.placeholder_token} {info.class_word}".strip(),
        "modelspec.resolution": "{0}x{0}".format(info.training.get("resolution", "")),
        "modelspec.prediction_type": str(info.training.get("prediction_type", "")),
    }
    if provenance.thumbnail is not None:
        metadata["modelspec.thumbnail"] = _thumbnail(provenance.thumbnail)
    if not host_arguments.disable_metadata:
        metadata["prompt"] = json.dumps(provenance.prompt)
        metadata.update({key: json.dumps(value) for key, value in (provenance.extra_pnginfo or {}).items()})
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
