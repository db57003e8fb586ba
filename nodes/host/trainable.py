"""What has to be different about a ComfyUI model while gradients flow, and is put back afterwards.

ComfyUI runs every node under `torch.inference_mode()`, and what loaders make there can never take part in a backward
pass. The weights themselves are replaced by equal copies once and stay so; the rest lasts for the training only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import comfy.model_management as model_management
import torch
from comfy.clip_model import CLIPLayer
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.attention import differentiable_attention
from ...core.kv import BlockKey

NOT_RECOMPUTED = "sa_inject_not_recomputed"  # option that names a block which must run outside a checkpoint


def make_differentiable(module: nn.Module) -> None:
    """Replace tensors that were born in inference mode by equal ones that autograd accepts, byte for byte.

    Only for a fully loaded module; must be repeated after every load, for moving a module under inference mode makes
    such tensors again. Frozen parameters end up with `requires_grad` False.
    """
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is None:
                continue
            if _born_in_inference(parameter):
                child._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            else:
                parameter.requires_grad_(False)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and _born_in_inference(buffer):
                child._buffers[name] = buffer.detach().clone()


def normal_tensor(tensor: Tensor) -> Tensor:
    """A copy that autograd accepts; to be called outside inference mode."""
    return tensor.detach().clone()


def _born_in_inference(tensor: Tensor) -> bool:
    # A parameter whose storage was swapped by a move to another device no longer says that it is an inference tensor,
    # but still has no version counter, and backward fails on it.
    try:
        _ = tensor._version
    except RuntimeError:
        return True
    return tensor.is_inference()


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Leave inference mode, and tell hosts that know about training that it happens."""
    knows = hasattr(model_management, "in_training")
    before = getattr(model_management, "in_training", None)
    with torch.inference_mode(False), torch.enable_grad():
        if knows:
            model_management.in_training = True
        try:
            yield
        finally:
            if knows:
                model_management.in_training = before


@contextlib.contextmanager
def out_of_place_text_encoder(clip: Any) -> Iterator[None]:
    """Let gradients through the text encoder, whose layers add to their input in place.

    ComfyUI offers no hook for this, so the layers of this one encoder get a forward of their own, and lose it again.
    """
    layers = [m for m in clip.cond_stage_model.modules() if isinstance(m, CLIPLayer)]
    with _own_forward(layers, _clip_layer_forward):
        yield


@contextlib.contextmanager
def recomputed_activations(unet: nn.Module) -> Iterator[None]:
    """Gradient checkpointing: keep the inputs of every residual and transformer block, and recompute the rest.

    ComfyUI's UNet ignores its own checkpointing flag. The options are copied at the time of the call, because the
    host goes on writing the current block's address into the same dictionary.
    """
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock | ResBlock)]
    with _own_forward(blocks, _recomputed_forward):
        yield


@contextlib.contextmanager
def _own_forward(modules: list[nn.Module], forward: Any) -> Iterator[None]:
    for module in modules:
        module.__dict__["forward"] = functools.partial(forward, module, module.forward)
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _clip_layer_forward(layer: Any, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    x = x + layer.self_attn(layer.layer_norm1(x), *args, **kwargs)
    return x + layer.mlp(layer.layer_norm2(x))


def _recomputed_forward(module: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Tensor:
    options = kwargs.get("transformer_options")
    if options is None:
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    if options.get(NOT_RECOMPUTED) == (*options["block"], options["block_index"]):
        return original(*args, **kwargs)
    snapshot = dict(options)

    def run(*inputs: Any) -> Tensor:
        return original(*inputs, **{**kwargs, "transformer_options": dict(snapshot)})

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def differentiable_options(not_recomputed: BlockKey | None = None) -> dict[str, Any]:
    """Options for a UNet call with a backward pass: torch's own attention, whatever the host would choose."""

    def attend(original: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        return differentiable_attention(q, k, v, heads)

    options: dict[str, Any] = {"optimized_attention_override": attend}
    if not_recomputed is not None:
        options[NOT_RECOMPUTED] = tuple(not_recomputed)
    return options
