"""Puts the demo's checkpoint together: shipped UNet and autoencoder, and the text encoder from its seed.

    python -m demo.base.checkpoint OUTPUT.safetensors

ComfyUI's CheckpointLoaderSimple recognises the file as Stable Diffusion 1.5, of which it is a small version. If no
weights are shipped, it contains random ones of the same shapes, which load and run but draw nothing.
"""

import argparse
import logging
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .autoencoder import new_autoencoder
from .text_encoder import text_encoder_state_dict
from .unet import new_unet
from .weights import AUTOENCODER_PREFIX, UNET_PREFIX, WEIGHTS, read_weights

log = logging.getLogger(__name__)

TEXT_ENCODER_PREFIX: str = "cond_stage_model.transformer.text_model."
CLOSED_STD: float = 0.1  # of random residual branches, so that a deep random UNet stays finite in float16


def _write(path: Path, tensors: dict[str, Tensor], origin: str) -> None:
    tensors |= {TEXT_ENCODER_PREFIX + name: value for name, value in text_encoder_state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    metadata = {"modelspec.title": "SA-Inject demo base", "modelspec.architecture": "stable-diffusion-v1"}
    metadata["weights"] = origin
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata)
    partial.replace(path)


def write_random_checkpoint(path: Path, seed: int = 0) -> None:
    """A checkpoint that loads like the real one, with random weights."""
    tensors = {UNET_PREFIX + name: value for name, value in new_unet(seed, CLOSED_STD).state_dict().items()}
    tensors |= {AUTOENCODER_PREFIX + name: value for name, value in new_autoencoder(seed).state_dict().items()}
    _write(path, {name: value.half() for name, value in tensors.items()}, f"random, seed {seed}")


def write_checkpoint(path: Path, weights: Path = WEIGHTS) -> None:
    """The base model, from weights that match their checksum. Random weights if none are shipped."""
    if weights.exists():
        _write(path, read_weights(weights), weights.name)
        return
    log.warning("No %s here: %s gets random weights, which load and run but draw nothing.", weights.name, path.name)
    write_random_checkpoint(path)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    with torch.inference_mode():
        write_checkpoint(arguments.output, arguments.weights)
    log.info("wrote %s, %.0f MB", arguments.output, arguments.output.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
