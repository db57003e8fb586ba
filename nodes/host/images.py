"""Convert and check ComfyUI's images.

ComfyUI's IMAGE is (b, h, w, c) in 0..1. In the rest of the pack a picture is (1, 3, h, w) and a mask (h, w).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .masks import cropped_mask, resized_mask

if TYPE_CHECKING:
    from comfy.sd import VAE

log = logging.getLogger(__name__)

Fit = Literal["crop", "pad", "stretch"]
SIZE_MULTIPLE = 64  # pixels; then every level of a UNet has whole tokens
GREY = 0.5
VAE_CURE = (
    "Start ComfyUI with --fp32-vae (or --bf16-vae), or connect a VAE that was fixed for float16, such as "
    "sdxl-vae-fp16-fix for SDXL."
)


def split_images(images: Sequence[Tensor], what: str) -> list[Tensor]:
    """Split batches and lists of IMAGE into single RGB pictures, float32. -> (1, 3, h, w) each

    Alpha is composed onto grey, and grey becomes RGB. The result is on the CPU, where any size can be resized. Raises
    ValueError, with the picture's number, for no pixels, NaN or infinite values, or a wrong number of channels.
    """
    pictures = []
    for batch in images:
        if batch.ndim != 4:
            raise ValueError(
                f"{what}: expected images of shape (batch, height, width, channels), got {tuple(batch.shape)}."
            )
        for picture in batch:
            pictures.append(_rgb(picture, f"{what}: image {len(pictures) + 1}"))
    if not pictures:
        raise ValueError(f"{what}: there are no images. Connect at least one picture of the subject.")
    return pictures


def fit_picture(picture: Tensor, mask: Tensor | None, resolution: int, fit: Fit) -> tuple[Tensor, Tensor | None]:
    """Bring a picture and its mask to resolution x resolution pixels.

    crop: cover the square and cut the rest away. pad: fit inside and add grey, masked out. stretch: change the aspect.
    (1, 3, h, w), (h, w) -> (1, 3, resolution, resolution), (resolution, resolution)
    """
    h, w = picture.shape[-2:]
    if fit == "stretch":
        return resized(picture, resolution, resolution), resized_mask(mask, resolution, resolution)
    ratio = (max if fit == "crop" else min)(resolution / h, resolution / w)
    tall, wide = max(1, round(h * ratio)), max(1, round(w * ratio))
    picture, mask = resized(picture, tall, wide), resized_mask(mask, tall, wide)
    if fit == "crop":
        return center_crop(picture, resolution, resolution), cropped_mask(mask, resolution, resolution)
    if (tall, wide) == (resolution, resolution):
        return picture, mask
    top, left = (resolution - tall) // 2, (resolution - wide) // 2
    border = (left, resolution - wide - left, top, resolution - tall - top)
    inside = torch.ones(tall, wide, device=picture.device) if mask is None else mask
    return F.pad(picture, border, value=GREY), F.pad(inside, border, value=0.0)


def bucket_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Training size of a picture: about resolution^2 pixels, its own aspect ratio, sides in steps of 64 pixels."""
    snap = min(SIZE_MULTIPLE, resolution)
    ratio = resolution / (height * width) ** 0.5
    return tuple(max(snap, round(side * ratio / snap) * snap) for side in (height, width))


def cover(picture: Tensor, mask: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Resize a picture and its mask to cover `size` (height, width), then crop the centre."""
    height, width = size
    h, w = picture.shape[-2:]
    ratio = max(height / h, width / w)
    tall, wide = max(height, round(h * ratio)), max(width, round(w * ratio))
    return (
        center_crop(resized(picture, tall, wide), height, width),
        cropped_mask(resized_mask(mask, tall, wide), height, width),
    )


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    if picture.shape[-2:] == (height, width):
        return picture
    return F.interpolate(picture, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def center_crop(picture: Tensor, height: int, width: int) -> Tensor:
    top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
    return picture[..., top : top + height, left : left + width]


def to_comfy(picture: Tensor) -> Tensor:
    """(b, c, h, w) -> ComfyUI's IMAGE (b, h, w, c)"""
    return rearrange(picture, "b c h w -> b h w c").contiguous()


def encode_picture(vae: VAE, picture: Tensor, latent_channels: int | None = None) -> Tensor:
    """VAE latent of one picture, not yet scaled for a model. (1, 3, h, w) -> (1, c, h/8, w/8)

    Raises ValueError if the latents have another shape than the model's, or NaN or infinite values.
    """
    latent = cast("Tensor", vae.encode(to_comfy(picture)))
    if latent.ndim != 4 or (latent_channels is not None and latent.shape[1] != latent_channels):
        raise ValueError(
            f"The connected VAE makes latents of {latent.shape[1]} channels and {latent.ndim - 2} dimensions, but the "
            f"model wants {latent_channels or 4} channels and 2. Connect the VAE of the same base model."
        )
    if not bool(latent.isfinite().all()):
        raise ValueError(f"{vae_name(vae)} gave NaN or infinite values for a picture. {VAE_CURE}")
    return latent


def decode_latents(vae: VAE, latent: Tensor) -> Tensor:
    """IMAGE (b, h, w, c) of latents. NaN becomes black, and the log says so."""
    images = vae.decode(latent)
    if bool(images.isfinite().all()):
        return images
    if bool(latent.isfinite().all()):
        log.warning("%s gave NaN or infinite values, so previews are black. %s", vae_name(vae), VAE_CURE)
    else:
        log.warning("The model drew NaN or infinite values, so previews are black.")
    return images.nan_to_num(0.0, 0.0, 0.0)


def vae_name(vae: VAE) -> str:
    """The VAE's kind of network and precision, for messages."""
    network = type(getattr(vae, "first_stage_model", vae)).__name__
    dtype = getattr(vae, "vae_dtype", None)
    return f"The connected VAE ({network}{'' if dtype is None else f' in {dtype}'.replace('torch.', '')})"


def _rgb(picture: Tensor, what: str) -> Tensor:
    h, w, c = picture.shape
    if h == 0 or w == 0:
        raise ValueError(f"{what} has no pixels ({w}x{h}). Remove it.")
    if not bool(torch.isfinite(picture).all()):
        raise ValueError(f"{what} holds NaN or infinite values. Remove it or save it again.")
    picture = picture.cpu().float()
    if not 0 <= picture.amin() <= picture.amax() <= 1:  # a copy only then: many pictures of a camera fill the memory
        picture = picture.clamp(0, 1)
    picture = rearrange(picture, "h w c -> 1 c h w")
    if c == 3:
        return picture
    if c == 1:
        return picture.expand(-1, 3, -1, -1)
    if c == 4:
        alpha = picture[:, 3:]
        return picture[:, :3] * alpha + GREY * (1 - alpha)
    raise ValueError(f"{what} has {c} channels; a picture has 1 (grey), 3 (RGB) or 4 (RGBA).")
