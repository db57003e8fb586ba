"""ComfyUI's UNets: their kind, and the inputs of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import comfy.model_sampling as model_sampling
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import SDXL, SDXLRefiner
from torch import Tensor

from ....core.image_prompt import TextConditioning
from ....core.layers import SelfAttentionLayer, self_attention_layers
from ....core.schedule import CLEAN_NOISE_FRACTION

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    from ..host_types import ModelSampling

FAMILIES: dict[int, str] = {768: "SD1.x", 1024: "SD2.x", 1280: "SDXL refiner", 2048: "SDXL"}  # by the text's width

# Derived classes first: most are derived from EPS.
PREDICTIONS: dict[str, type] = {
    "edm": model_sampling.EDM,
    "v_prediction": model_sampling.V_PREDICTION,
    "x0": model_sampling.X0,
    "eps": model_sampling.EPS,
    "flow": model_sampling.CONST,
}


class UnetDescription(NamedTuple):
    architecture: str
    layers: tuple[SelfAttentionLayer, ...]


class NetworkInputs(NamedTuple):
    """Inputs of the UNet, cast and scaled. All have the same rows."""

    x: Tensor
    timestep: Tensor
    context: Tensor
    y: Tensor | None


def describe(model: ModelPatcher) -> UnetDescription:
    """Describe the UNet of a ModelPatcher. Raises ValueError with the model's name if it is not supported."""
    base = model.model
    unet = getattr(base, "diffusion_model", None)
    if not isinstance(unet, UNetModel) or any(isinstance(m, SpatialVideoTransformer) for m in unet.modules()):
        raise ValueError(
            f"SA-Inject works on the image UNets of SD1.x, SD2.x and SDXL, but the connected model is "
            f"{type(base).__name__}. Connect a checkpoint of one of these families."
        )
    # Another model that shares this network may be loaded, with its object patches. The originals are used.
    prefix, kept = "diffusion_model.", getattr(model, "object_patches_backup", {})
    originals = {path.removeprefix(prefix): kept[path] for path in kept if path.startswith(prefix)}
    layers = self_attention_layers(unet, originals)
    if not layers:
        raise ValueError(f"The connected {type(base).__name__} model has no self-attention layer to inject into.")
    width = base.model_config.unet_config.get("context_dim")
    return UnetDescription(FAMILIES.get(width, type(base).__name__), layers)


def prediction_type(model: ModelPatcher) -> str:
    """The prediction type of a ModelPatcher as the sampler uses it, with nodes such as ModelSamplingDiscrete.

    LCM and other distilled models have the type of their original model.
    """
    sampling = model.get_model_object("model_sampling")
    return next((name for name, kind in PREDICTIONS.items() if isinstance(sampling, kind)), type(sampling).__name__)


def pooled_width(base: BaseModel) -> int | None:
    """Width of the model's pooled text vector. None: it has none."""
    sizes = 6 if isinstance(base, SDXL) else 5 if isinstance(base, SDXLRefiner) else None  # 256 channels for each
    return None if sizes is None else base.adm_channels - 256 * sizes


def compute_dtype(base: BaseModel) -> torch.dtype:
    """The precision of the model's computation in ComfyUI. The stored weights may have another."""
    return base.manual_cast_dtype or base.get_dtype()


def clean_reference_sigma(sampling: ModelSampling) -> float:
    """The sigma that the UNet is given for a reference without noise: see core/schedule.py."""
    return float(sampling.percent_to_sigma(1 - CLEAN_NOISE_FRACTION))


def model_conditions(base: BaseModel, latent: Tensor, text: TextConditioning, **more: float) -> dict[str, Tensor]:
    """Ask the model for its other inputs: context, SDXL's size embedding, an inpainting model's mask.

    latent (b, c, h, w), scaled; text with b rows. `more`: further values that a network needs, such as its guidance.
    -> `c_crossattn`, and for some models `y` and `c_concat`: names of `apply_model`'s arguments
    """
    b, _, h, w = latent.shape
    # The function of the class: an object patch of another node would use that node's picture.
    conditions = type(base).extra_conds(
        base,
        noise=latent,
        latent_image=latent,  # only its shape is used: without a mask, an inpainting model gets a blank picture
        device=latent.device,
        cross_attn=text.cross_attn.to(latent.device),
        pooled_output=None if text.pooled is None else text.pooled.to(latent.device),
        width=w * 8,
        height=h * 8,
        prompt_type="positive",
        **more,
    )
    return {name: condition.process_cond(batch_size=b, area=None).cond for name, condition in conditions.items()}


def network_inputs(
    base: BaseModel, noisy: Tensor, sigma: Tensor, text: TextConditioning, dtype: torch.dtype
) -> NetworkInputs:
    """Scale and cast the inputs of a direct call of the UNet, as in BaseModel.apply_model.

    noisy (b, c, h, w), sigma (b,), text with b rows. The reference pass calls the UNet directly, because another pack
    may have wrapped apply_model.
    """
    conditions = model_conditions(base, noisy, text)
    x = base.model_sampling.calculate_input(sigma, noisy)
    if "c_concat" in conditions:
        x = torch.cat([x, conditions["c_concat"].to(x)], dim=1)  # (b, c + extra, h, w)
    y = conditions.get("y")
    return NetworkInputs(
        x=x.to(dtype),
        timestep=base.model_sampling.timestep(sigma).float(),
        context=conditions["c_crossattn"].to(x.device, dtype),
        y=None if y is None else y.to(x.device, dtype),
    )
