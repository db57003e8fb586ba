"""The results of an inspection as two pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..heatmap import marked, overlay, sheet
from ..images import decode_latents
from .inspection import STAGES, Inspection

if TYPE_CHECKING:
    from comfy.sd import VAE

PARTS = {"input": "encoder", "middle": "middle", "output": "decoder"}


def added_sheet(found: Inspection, vae: VAE, noise_levels: int) -> Tensor:
    """How much the references add, by part of the UNet (rows) and noise level (columns). -> IMAGE (1, h, w, 3)"""
    picture = _picture(vae, found.latent)
    sigmas = list(found.levels)
    indices = np.linspace(0, len(sigmas) - 1, min(noise_levels, len(sigmas))).round().astype(int)
    chosen = [sigmas[index] for index in indices]
    means = {(stage, sigma): found.levels[sigma].mean(stage) for stage in STAGES for sigma in chosen}
    rows = []
    for stage in STAGES:
        shown = [(sigma, mean) for sigma in chosen if (mean := means[stage, sigma]) is not None]
        highest = max((float(mean.max()) for _, mean in shown), default=0.0)  # one scale for each part of the UNet
        rows.append(
            [
                (f"{PARTS[stage]}, sigma {sigma:.2f}: 0 to {highest:.2g}", overlay(picture, mean, highest))
                for sigma, mean in shown
            ]
        )
    title = "How much the reference adds at each place"
    legend = "size of what is added, divided by that of the self-attention"
    return _image(sheet([row for row in rows if row], title, legend, "highest of the row"))


def attention_sheet(found: Inspection, vae: VAE, point: tuple[float, float]) -> Tensor:
    """The picture with the chosen point, then each reference with that point's attention. -> IMAGE (1, h, w, 3)"""
    references = [reference for injection in found.injections for reference in injection.image_prompt.pictures]
    highest = max(float(seen.max()) for seen in found.attention_maps) or 1.0
    row = [("the chosen place", marked(_picture(vae, found.latent), point))]
    for number, (reference, seen) in enumerate(zip(references, found.attention_maps, strict=True)):
        text = f"reference {number + 1}: {float(seen.sum()):.0%} of the attention"
        row.append((text, overlay(_picture(vae, reference.latent), seen, highest)))
    title = "Where in the references the chosen place looks, over all layers and steps"
    return _image(sheet([row], title, "share of the place's attention to the references", f"{highest:.2g}"))


def _picture(vae: VAE, latent: Tensor) -> Image.Image:
    image = decode_latents(vae, latent[:1])
    return Image.fromarray((image.reshape(-1, *image.shape[-3:])[0].clamp(0, 1) * 255).round().byte().cpu().numpy())


def _image(made: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(made).astype(np.float32) / 255)[None]
