"""The base model's autoencoder in TAESD layout (Ollin Boer Bohan's tiny autoencoder): creation, loading, use.

`autoencoder_training.py` trains it.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .host import use_host
from .precision import fast

use_host("cuda" if torch.cuda.is_available() else "cpu")
from comfy.taesd.taesd import TAESD  # noqa: E402

LATENT_SCALE: float = 0.18215  # SD1.5's latent scale; the host's own TAESD loader divides by it too


def new_autoencoder(seed: int) -> TAESD:
    """The host's class with random weights. Its layers come uninitialised."""
    model = TAESD(latent_channels=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("vae_"):
                continue
            if weight.ndim == 1:
                weight.zero_()
                continue
            gain = 0.5 if name.endswith("conv.4.weight") else 2**0.5
            weight.normal_(0, gain / weight[0].numel() ** 0.5, generator=generator)
        model.vae_scale.fill_(LATENT_SCALE)
    model.vae_scale.requires_grad_(False)
    model.vae_shift.requires_grad_(False)
    return model


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB pictures of one size. -> (b, 3, h, w) in 0..1"""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def weights_of(model: TAESD) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}


def load_autoencoder(path: Path, device: str = "cpu") -> TAESD:
    model = TAESD(latent_channels=4)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def encode(model: TAESD, images: list[Image.Image], device: str = "cpu") -> Tensor:
    """Encode pictures to latents, scaled as for the UNet. -> (b, 4, h/8, w/8)"""
    pixels = to_tensor(images).to(device, memory_format=torch.channels_last)
    with fast(device):
        return model.taesd_encoder(pixels).float().cpu()


@torch.no_grad()
def decode(model: TAESD, latent: Tensor, device: str = "cpu") -> list[Image.Image]:
    """Decode latents (b, 4, h, w), scaled as for the UNet."""
    latent = latent.to(device, memory_format=torch.channels_last)
    with fast(device):
        pixels = model.taesd_decoder(latent).float().clamp(0, 1)
    pixels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]
