"""Changes to a ComfyUI model for the backward pass. All but one are undone after the training.

ComfyUI runs every node under `torch.inference_mode()`, and autograd refuses tensors that were created there. So the
parameters are replaced by new ones that share their memory. These stay after the training.
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

# Layers with a known forward. Those for fp8 and quantized weights also scale, and are not changed.
LINEARS = (disable_weight_init.Linear, manual_cast.Linear)
CONVOLUTIONS = (disable_weight_init.Conv2d, manual_cast.Conv2d)


def make_differentiable(module: nn.Module) -> None:
    """Replace inference tensors by tensors that autograd accepts and that share their memory.

    The module must be fully loaded. Repeat it after every load: moving a module under inference mode creates inference
    tensors again. All parameters get `requires_grad` False.
    """
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is None:
                continue
            if is_inference_tensor(parameter):
                normal = nn.Parameter(_alias_storage(parameter), requires_grad=False)
                vars(normal).update(vars(parameter))  # attributes that the host sets on a weight
                child._parameters[name] = normal
            else:
                parameter.requires_grad_(False)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and is_inference_tensor(buffer):
                child._buffers[name] = normal = _alias_storage(buffer)
                vars(normal).update(vars(buffer))


def clone_for_autograd(tensor: Tensor) -> Tensor:
    """A copy that autograd accepts. Call it outside of inference mode."""
    return tensor.detach().clone()


def _alias_storage(tensor: Tensor) -> Tensor:
    # A view would be an inference tensor too. So a new tensor gets the same storage.
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain:  # a quantized weight has more data than its storage
        return clone_for_autograd(tensor)
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def is_inference_tensor(tensor: Tensor) -> bool:
    # After a move to another device, `is_inference()` is False for such a parameter. But it has no version counter, and
    # the backward pass fails.
    try:
        _ = tensor._version
    except RuntimeError:
        return True
    return tensor.is_inference()


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Leave inference mode, and set the host's flag for training, which newer versions have."""
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
    """Make the layers of the text encoders differentiable: they add to their input in place.

    ComfyUI has no hook for this, so the layers of this CLIP get another forward inside this context.
    checkpointing: store only the input of each layer, and recompute the rest in the backward pass.
    dtype: of the matrix products. The residual stream stays in float32.
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
    """Let frozen layers store only their weights for the backward pass, without a copy.

    Torch would store the input of each convolution, and a float32 copy of each half-precision weight. For a text
    encoder that is twice its size per caption.
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
    """Recompute cheap operations in the backward pass, and store only their input.

    These are group norm with SiLU, and the GELU gate of the feed-forward layers.
    """
    normed = [m for m in unet.modules() if type(m) is nn.Sequential and _begins_with_norm_and_silu(m)]
    gates = [m for m in unet.modules() if type(m) is GEGLU]
    with patched_forward(normed, _recompute_norm_and_silu), patched_forward(gates, _recompute_gate):
        yield


@contextlib.contextmanager
def checkpoint_activations(unet: nn.Module) -> Iterator[None]:
    """Gradient checkpointing (Chen et al., 2016): store the inputs of each block, and recompute the rest.

    ComfyUI's UNet ignores its own checkpointing flag. The options are copied at the call, because the host writes each
    block's address into the same dictionary.
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
        return original(*args, **kwargs)  # nothing would be stored
    options = kwargs.get("transformer_options")
    if options is None:
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    snapshot = dict(options)

    def run(*inputs: Any) -> Tensor:
        return original(*inputs, **{**kwargs, "transformer_options": dict(snapshot)})

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def differentiable_options() -> TransformerOptions:
    """Options for a call with a backward pass: torch's attention, which is differentiable, in place of the host's."""

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
