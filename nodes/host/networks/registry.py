"""Chooses the functions for each kind of network, and refuses networks that are not supported."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from ....core.image_prompt import TextConditioning
from ....core.kv import BlockKey
from ....core.layers import SelfAttentionLayer
from ....core.positions import PositionRule
from ....core.site import AtSite
from . import flux, nextdit, transformers, unet, unet_sites
from .architectures import ARCHITECTURES, PATCHED, refusal
from .transformers import TransformerInputs
from .unet import NetworkInputs, UnetDescription

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    from ..host_types import Arguments, TransformerOptions

log = logging.getLogger(__name__)

FOREIGN_WEIGHTS = ("GGML", "GGUF", "SVDQ", "Nunchaku")  # in class names of foreign weight formats


def describe(model: ModelPatcher) -> UnetDescription:
    """Describe the network of a ModelPatcher. Raises ValueError with the model's name if it is not supported."""
    base = model.model
    network = getattr(base, "diffusion_model", None)
    if isinstance(network, UNetModel) and not any(isinstance(m, SpatialVideoTransformer) for m in network.modules()):
        return unet.describe(model)
    family = _family(base, network)
    if family is None:
        raise ValueError(refusal(_names(base, network)))
    foreign = next((name for name in _weight_classes(network) if name.startswith(FOREIGN_WEIGHTS)), None)
    if foreign is not None:
        raise ValueError(refusal([f"{family} as {foreign}"], PATCHED))
    return UnetDescription(family, _attention_layers(network))


def is_transformer(network: nn.Module | None) -> bool:
    network = getattr(network, "_orig_mod", network)  # the network inside a compiled one
    return nextdit.is_nextdit(network) or flux.is_flux(network)


def attending(
    network: nn.Module,
    options: TransformerOptions,
    at: AtSite,
    blocks: Collection[BlockKey],
    *,
    size: tuple[int, int],
    keeps_hidden: bool = False,
) -> AbstractContextManager[TransformerOptions]:
    """Options for one call of the network, in which `at` computes the self-attention of these blocks.

    size: of the latent (h, w). keeps_hidden: each site has its hidden states.
    """
    if nextdit.is_nextdit(network):
        return nextdit.attending(network, options, at, blocks, size=size, keeps_hidden=keeps_hidden)
    if flux.is_flux(network):
        return flux.attending(network, options, at, blocks, size=size, keeps_hidden=keeps_hidden)
    return unet_sites.attending(network, options, at, blocks, keeps_hidden=keeps_hidden)


def hooked(network: nn.Module) -> AbstractContextManager[None]:
    """The context that `attending` needs while a backward pass recomputes layers."""
    return nextdit.hooked(network) if nextdit.is_nextdit(network) else nullcontext()


def network_inputs(
    base: BaseModel, noisy: Tensor, sigma: Tensor, text: TextConditioning, dtype: torch.dtype
) -> NetworkInputs | TransformerInputs:
    """Scale and cast the inputs of a direct call. noisy (b, c, h, w), sigma (b,), text with b rows"""
    kind = transformers if is_transformer(base.diffusion_model) else unet
    return kind.network_inputs(base, noisy, sigma, text, dtype)


def call_network(network: nn.Module, inputs: NetworkInputs | TransformerInputs, options: TransformerOptions) -> Tensor:
    """Call the network directly, without the wrappers of other packs around the model."""
    if isinstance(inputs, TransformerInputs):
        return network(inputs.x, inputs.timestep, **inputs.conditions, transformer_options=options)
    return network(*inputs, None, options)


def model_conditions(base: BaseModel, latent: Tensor, text: TextConditioning) -> Arguments:
    """The model's inputs besides the latent, by their names in `apply_model`."""
    kind = transformers if is_transformer(base.diffusion_model) else unet
    return kind.model_conditions(base, latent, text)


def text_width(base: BaseModel) -> int:
    is_unet = not is_transformer(base.diffusion_model)
    return base.model_config.unet_config["context_dim"] if is_unet else transformers.text_width(base)


def pooled_width(base: BaseModel) -> int | None:
    """Width of the model's pooled text vector. None: it has none."""
    return (transformers if is_transformer(base.diffusion_model) else unet).pooled_width(base)


def positions(architecture: str) -> PositionRule:
    """The default rule for positions between a picture and its references."""
    return ARCHITECTURES[architecture].positions if architecture in ARCHITECTURES else "none"


def is_distilled(base: BaseModel) -> bool:
    """Whether the guidance scale is an input of the network. Then it is sampled without a negative prompt."""
    return is_transformer(base.diffusion_model) and transformers.has_guidance_input(base)


def warn_if_experimental(architecture: str) -> None:
    if architecture in ARCHITECTURES and ARCHITECTURES[architecture].is_experimental:
        log.warning(
            "SA-Inject: support for %s is experimental. It was tested on small models. How well full-size ones draw "
            "with it has not been measured.",
            architecture,
        )


def _family(base: BaseModel, network: nn.Module | None) -> str | None:
    config = type(getattr(base, "model_config", None)).__name__
    if nextdit.is_nextdit(network):
        return "Z-Image" if config == "ZImage" and getattr(network, "siglip_embedder", None) is None else None
    if not flux.is_flux(network) or not flux.is_plain(network):
        return None
    return {"Flux": "Flux.1", "FluxSchnell": "Flux.1", "Flux2": "Flux.2", "Chroma": "Chroma"}.get(config)


def _attention_layers(network: nn.Module | None) -> tuple[SelfAttentionLayer, ...]:
    return (nextdit if nextdit.is_nextdit(network) else flux).attention_layers(network)


def _names(base: BaseModel, network: nn.Module | None) -> list[str]:
    """The class names of a model and of its network, the best known first."""
    config = type(getattr(base, "model_config", None)).__name__
    classes = [*type(base).__mro__, *type(network).__mro__]
    first = config if type(base).__name__ in ("Lumina2", "Flux", "Flux2") else type(base).__name__
    return [first, config, *(kind.__name__ for kind in classes)]


def _weight_classes(network: nn.Module) -> list[str]:
    kinds = {type(module).__name__ for module in network.modules()}
    return sorted(kinds | {type(weight).__name__ for weight in network.parameters()})
