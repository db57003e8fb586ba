"""What has to be different about a ComfyUI model while gradients flow, and is put back afterwards.

ComfyUI runs every node under `torch.inference_mode()`, and what loaders make there can never take part in a backward
pass. The parameters are replaced once by others over the same memory and stay so; the rest lasts for the training only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import comfy.model_management as model_management
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.ops import disable_weight_init, manual_cast
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ....core.attention import differentiable_attention
from ....trainer.frozen_ops import CastBuffer, frozen_conv2d, frozen_linear, recompute
from .patched_forward import patched_forward
from .text_encoders import out_of_place

if TYPE_CHECKING:
    from comfy.sd import CLIP

    from ..host_types import Forward, TransformerOptions

# The layers whose forward is known; fp8 and quantized ones scale, too.
LINEARS = (disable_weight_init.Linear, manual_cast.Linear)
CONVOLUTIONS = (disable_weight_init.Conv2d, manual_cast.Conv2d)


def make_differentiable(module: nn.Module) -> None:
    """Replace tensors that were born in inference mode by ones that autograd accepts, over the very same memory.

    Only for a fully loaded module; must be repeated after every load, for moving a module under inference mode makes
    such tensors again. Frozen parameters end up with `requires_grad` False.
    """
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is None:
                continue
            if is_inference_tensor(parameter):
                normal = nn.Parameter(_alias_storage(parameter), requires_grad=False)
                vars(normal).update(vars(parameter))  # hosts hang their own notes on a weight
                child._parameters[name] = normal
            else:
                parameter.requires_grad_(False)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and is_inference_tensor(buffer):
                child._buffers[name] = normal = _alias_storage(buffer)
                vars(normal).update(vars(buffer))


def clone_for_autograd(tensor: Tensor) -> Tensor:
    """A copy that autograd accepts; to be called outside inference mode."""
    return tensor.detach().clone()


def _alias_storage(tensor: Tensor) -> Tensor:
    # Not a view in autograd's sense, which would be an inference tensor too: a tensor of its own that is given storage.
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain:  # a quantized weight is more than its storage
        return clone_for_autograd(tensor)
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def is_inference_tensor(tensor: Tensor) -> bool:
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
def out_of_place_text_encoder(clip: CLIP, checkpointing: bool, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Let gradients through the text encoders, whose layers add to their input in place.

    ComfyUI offers no hook for this, so the layers of this one encoder get a forward of their own, and lose it again.
    checkpointing: keep the input of every layer alone, and compute it once more in the backward pass.
    dtype: what its products are computed in. Their sum, which runs through all layers, stays in float32.
    """
    layers = [m for m in clip.cond_stage_model.modules() if out_of_place(m, dtype, checkpointing) is not None]

    def forward(layer: nn.Module, original: Forward, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        compute = out_of_place(layer, dtype, checkpointing)
        assert compute is not None
        return compute(*args, **kwargs)

    with patched_forward(layers, forward):
        yield


@contextlib.contextmanager
def memory_efficient_layers(*modules: nn.Module) -> Iterator[None]:
    """Let frozen layers keep nothing for the backward pass but their weight as it is stored.

    Torch would keep a convolution's input, and of every layer the copy that was cast to the computation's precision:
    of a text encoder in half precision, whose computation is float32, twice its size for every text.
    """
    layers = [layer for module in modules for layer in module.modules()]
    linears = [layer for layer in layers if type(layer) in LINEARS]
    convolutions = [layer for layer in layers if type(layer) in CONVOLUTIONS and layer.padding_mode == "zeros"]
    buffer = CastBuffer()
    with (
        patched_forward(linears, functools.partial(_frozen_linear, buffer)),
        patched_forward(convolutions, functools.partial(_frozen_convolution, buffer)),
    ):
        yield


@contextlib.contextmanager
def recompute_cheap_ops(unet: nn.Module) -> Iterator[None]:
    """Keep one tensor, and recompute the others, where a few cheap operations follow each other.

    These are a norm with the SiLU after it, and the gate of a feed-forward layer.
    """
    normed = [m for m in unet.modules() if type(m) is nn.Sequential and _begins_with_norm_and_silu(m)]
    gates = [m for m in unet.modules() if type(m) is GEGLU]
    with patched_forward(normed, _recompute_norm_and_silu), patched_forward(gates, _recompute_gate):
        yield


@contextlib.contextmanager
def checkpoint_activations(unet: nn.Module) -> Iterator[None]:
    """Gradient checkpointing: keep the inputs of every residual and transformer block, and recompute the rest.

    ComfyUI's UNet ignores its own checkpointing flag. The options are copied at the time of the call, because the
    host goes on writing the current block's address into the same dictionary.
    """
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock | ResBlock)]
    with patched_forward(blocks, _recompute_forward):
        yield


def _frozen_linear(buffer: CastBuffer, layer: nn.Module, original: Forward, x: Tensor) -> Tensor:
    return frozen_linear(x, layer.weight, layer.bias, buffer) if _can_be_frozen(layer, x) else original(x)


def _frozen_convolution(buffer: CastBuffer, layer: nn.Module, original: Forward, x: Tensor) -> Tensor:
    if not _can_be_frozen(layer, x) or isinstance(layer.padding, str):
        return original(x)
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return frozen_conv2d(x, layer.weight, layer.bias, buffer, *settings)


def _can_be_frozen(layer: nn.Module, x: Tensor) -> bool:
    weight, bias = layer.weight, layer.bias
    return (
        type(weight) is nn.Parameter
        and weight.device == x.device
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and not (layer.weight_function or layer.bias_function)  # patches that are applied while the model runs
    )


def _begins_with_norm_and_silu(layers: nn.Sequential) -> bool:
    return len(layers) > 1 and isinstance(layers[0], nn.GroupNorm) and isinstance(layers[1], nn.SiLU)


def _recompute_norm_and_silu(layers: nn.Sequential, original: Forward, x: Tensor) -> Tensor:
    norm, silu, *rest = layers
    x = recompute(lambda x: silu(norm(x)), x)
    for layer in rest:
        x = layer(x)
    return x


def _recompute_gate(layer: GEGLU, original: Forward, x: Tensor) -> Tensor:
    def gated(projected: Tensor) -> Tensor:
        x, gate = projected.chunk(2, dim=-1)
        return x * F.gelu(gate)

    return recompute(gated, layer.proj(x))


def _recompute_forward(module: nn.Module, original: Forward, *args: Any, **kwargs: Any) -> Tensor:
    if not any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())):
        return original(*args, **kwargs)  # nothing would be kept: the reference pass, and what precedes all gradients
    options = kwargs.get("transformer_options")
    if options is None:
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    snapshot = dict(options)

    def run(*inputs: Any) -> Tensor:
        return original(*inputs, **{**kwargs, "transformer_options": dict(snapshot)})

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def differentiable_options() -> TransformerOptions:
    """Options for a call with a backward pass: torch's own attention, whatever the host would choose."""

    def attend(
        original: Forward,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        **further: Any,
    ) -> Tensor:
        if not skip_reshape:
            return differentiable_attention(q, k, v, heads)
        if mask is not None and mask.ndim < 4:  # (n, n) and (b, n, n), as the host's kernels take them
            mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    return {"optimized_attention_override": attend}
