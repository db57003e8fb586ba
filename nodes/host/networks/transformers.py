"""The inputs of ComfyUI's diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ....core.image_prompt import TextConditioning
from . import unet

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

    from ..host_types import Arguments

# The guidance scale of guidance-distilled models in the reference pass and in training: 1 is no guidance.
GUIDANCE = 1.0


class TransformerInputs(NamedTuple):
    """Inputs of the network, cast and scaled. All have the same rows, and all texts have one length."""

    x: Tensor
    timestep: Tensor
    conditions: Arguments  # by the names of the network's arguments


def model_conditions(base: BaseModel, latent: Tensor, text: TextConditioning) -> Arguments:
    """Ask the model for its other inputs, by the names of `apply_model`'s arguments.

    latent (b, c, h, w), scaled; text with b rows of one length
    """
    guidance = {"guidance": GUIDANCE} if has_guidance_input(base) else {}
    return dict(unet.model_conditions(base, latent, text, **guidance))


def network_inputs(
    base: BaseModel, noisy: Tensor, sigma: Tensor, text: TextConditioning, dtype: torch.dtype
) -> TransformerInputs:
    """Scale and cast the inputs of a direct call, as in BaseModel.apply_model.

    noisy (b, c, h, w), sigma (b,), text with b rows of one length
    """
    conditions = model_conditions(base, noisy, text)
    context = conditions.pop("c_crossattn")
    cast = {name: _cast(value, noisy, dtype) for name, value in conditions.items()}
    return TransformerInputs(
        x=base.model_sampling.calculate_input(sigma, noisy).to(dtype),
        timestep=base.model_sampling.timestep(sigma).float(),
        conditions={"context": context.to(noisy.device, dtype), **cast},
    )


def text_width(base: BaseModel) -> int:
    config = base.model_config.unet_config
    return config["cap_feat_dim"] if "cap_feat_dim" in config else config["context_in_dim"]


def pooled_width(base: BaseModel) -> int | None:
    """Width of the model's pooled text vector. None: it has none."""
    return base.model_config.unet_config.get("vec_in_dim")


def has_guidance_input(base: BaseModel) -> bool:
    return bool(base.model_config.unet_config.get("guidance_embed"))


def _cast(value: Any, like: Tensor, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, dtype if value.is_floating_point() else value.dtype)
