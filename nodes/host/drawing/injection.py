"""From the inputs of an Apply node to an Injection, checked against the connected model."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.image_prompt import ImagePrompt
from ....core.kv import BlockKey
from ..networks.registry import describe, is_transformer, pooled_width, text_width, warn_if_experimental
from ..networks.unet import prediction_type
from ..progress import warn_on_node
from .sampling_run import ApplyTo, Injection

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

APPLY_TO: tuple[str, ...] = get_args(ApplyTo)
BLOCK_CHOICES: dict[str, tuple[str, ...]] = {
    "all": ("input", "middle", "output"),
    "encoder": ("input",),
    "middle": ("middle",),
    "decoder": ("output",),
    "middle and decoder": ("middle", "output"),
}


def build_injection(
    model: ModelPatcher,
    adapter: Adapter,
    image_prompt: ImagePrompt,
    strength: float,
    start_percent: float,
    end_percent: float,
    apply_to: ApplyTo,
    blocks: str,
    attn_mask: Tensor | None,
    node_id: str | None = None,
) -> Injection | None:
    """Check the inputs, and describe the injection. -> None if it would have no effect

    strength: factor. start_percent, end_percent: shares of the schedule, 0..1. attn_mask (h, w) or (1, h, w) in 0..1.
    Raises ValueError for an unknown model, for an adapter of another model, and for an image prompt of another VAE.
    """
    description = describe(model)
    adapter.check_fits(*description, prediction_type(model))
    warn_if_experimental(description.architecture)
    _check_latents(model, image_prompt)
    _check_texts(model, image_prompt)
    mask = None if attn_mask is None else _one_mask(attn_mask)
    chosen = _chosen_blocks(model, adapter, description.architecture, blocks)
    if start_percent >= end_percent:
        message = f"start_percent {start_percent:g} is not before end_percent {end_percent:g}, so nothing is injected."
        warn_on_node(message, node_id)
        return None
    if strength == 0 or not chosen:
        return None
    return Injection(
        adapter=adapter,
        image_prompt=image_prompt,
        strength=strength,
        start_percent=start_percent,
        end_percent=end_percent,
        apply_to=apply_to,
        blocks=chosen,
        attn_mask=mask,
        node_id=node_id,
    )


def _chosen_blocks(model: ModelPatcher, adapter: Adapter, architecture: str, blocks: str) -> frozenset[BlockKey]:
    if blocks == "all":
        return frozenset(adapter.blocks())
    if is_transformer(model.model.diffusion_model):
        raise ValueError(f"{architecture} has no {blocks}: its layers are all of one kind. Set blocks to 'all'.")
    return frozenset(key for key in adapter.blocks() if key.stage in BLOCK_CHOICES[blocks])


def _check_latents(model: ModelPatcher, image_prompt: ImagePrompt) -> None:
    wanted = model.model.latent_format.latent_channels
    for number, picture in enumerate(image_prompt.pictures, start=1):
        if picture.latent.shape[1] != wanted:
            raise ValueError(
                f"Picture {number} of the image prompt has {picture.latent.shape[1]} latent channels, but the model "
                f"wants {wanted}. Encode it with the VAE of this base model."
            )


def _check_texts(model: ModelPatcher, image_prompt: ImagePrompt) -> None:
    wanted, pooled = text_width(model.model), pooled_width(model.model)
    for number, picture in enumerate(image_prompt.pictures, start=1):
        if picture.text is None:
            continue
        name, width = f"The conditioning of picture {number} of the image prompt", picture.text.cross_attn.shape[-1]
        if width != wanted:
            raise ValueError(
                f"{name} has embedding size {width}, but the model expects {wanted}. Encode the text with the CLIP of "
                f"this base model."
            )
        found = None if picture.text.pooled is None else picture.text.pooled.shape[-1]
        if pooled not in (None, found):
            has = "no pooled vector" if found is None else f"a pooled vector of {found}"
            raise ValueError(
                f"{name} has {has}, but the model wants one of {pooled}. Encode the text with CLIPTextEncode and the "
                f"CLIP of this base model."
            )


def _one_mask(attn_mask: Tensor) -> Tensor:
    """The mask as (h, w) in 0..1. Raises ValueError for an empty mask, for NaN, and for different masks."""
    if not attn_mask.numel():
        raise ValueError("attn_mask is empty. Connect a mask of at least one pixel, or leave it open.")
    masks = attn_mask.reshape(-1, *attn_mask.shape[-2:]).float()
    if not bool(torch.isfinite(masks).all()):
        raise ValueError("attn_mask holds NaN or infinite values. Connect another mask.")
    if any(not mask.equal(masks[0]) for mask in masks[1:]):
        raise ValueError(
            f"attn_mask is a batch of {len(masks)} masks, but one mask is wanted. Pick one of them, or chain an Apply "
            f"node for each."
        )
    return masks[0].clamp(0, 1)
