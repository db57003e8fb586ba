"""The trained weights in this repository: UNet and autoencoder in float16, checked against a SHA-256."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS: Path = Path(__file__).with_name("weights.safetensors")
CHECKSUM: Path = Path(__file__).with_name("weights.sha256")
UNET_PREFIX: str = "model.diffusion_model."
AUTOENCODER_PREFIX: str = "first_stage_model."


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_weights(unet: dict[str, Tensor], autoencoder: dict[str, Tensor], path: Path = WEIGHTS) -> Path:
    """Write both with their checkpoint names, and the checksum beside them."""
    tensors = {UNET_PREFIX + name: value for name, value in unet.items()}
    tensors |= {AUTOENCODER_PREFIX + name: value for name, value in autoencoder.items()}
    partial = path.with_suffix(".part")
    save_file({name: value.to(torch.float16).contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)
    path.with_suffix(".sha256").write_text(f"{sha256(path)}  {path.name}\n")
    return path


def read_weights(path: Path = WEIGHTS) -> dict[str, Tensor]:
    """The shipped tensors, by their checkpoint names."""
    checksum = path.with_suffix(".sha256")
    for needed in (path, checksum):
        if not needed.exists():
            raise FileNotFoundError(f"{needed.name} is missing from {needed.parent}. Fetch the repository again.")
    expected = checksum.read_text().split()[0]
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{path.name} is damaged: its SHA-256 is {found}, expected {expected}. Fetch it again.")
    return load_file(path)


def read_parts(path: Path = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """UNet and autoencoder with their modules' tensor names, in float32."""
    tensors = {name: tensor.float() for name, tensor in read_weights(path).items()}
    unet, autoencoder = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (UNET_PREFIX, AUTOENCODER_PREFIX)
    )
    return unet, autoencoder
