"""Out-of-place versions of ComfyUI's text encoder layers, for the backward pass.

ComfyUI's layers add to their input in place. Here each has another forward with the same result. The layers compute in
a given precision; the residual sum stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from comfy.clip_model import CLIPLayer
from comfy.text_encoders.llama import TransformerBlock as LlamaBlock
from comfy.text_encoders.t5 import T5LayerFF, T5LayerSelfAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ....trainer.frozen_ops import recompute

if TYPE_CHECKING:
    from ..host_types import Forward


def out_of_place(layer: nn.Module, dtype: torch.dtype, checkpointing: bool) -> Forward | None:
    """The forward of a layer in training. None if the layer can be used as it is.

    checkpointing: store only the layer's input, and recompute the rest in the backward pass.
    """
    kind = next((kind for kind in FORWARDS if isinstance(layer, kind)), None)
    if kind is None or type(layer).forward is not kind.forward:
        return None
    forward = FORWARDS[kind]
    compute = partial(forward, dtype, layer)
    return partial(_recomputed, compute) if checkpointing else compute


def _clip_layer(
    dtype: torch.dtype, layer: CLIPLayer, x: Tensor, mask: Tensor | None, attend: Callable[..., Tensor]
) -> Tensor:
    x = x + layer.self_attn(layer.layer_norm1(x).to(dtype), _in_dtype(mask, dtype), attend)
    mlp = layer.mlp
    return x + mlp.fc2(recompute(mlp.activation, mlp.fc1(layer.layer_norm2(x).to(dtype))))


def _llama_block(
    dtype: torch.dtype,
    block: LlamaBlock,
    x: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Tensor | None = None,
    **rest: Any,
) -> Tensor | tuple[Tensor, ...]:
    normed = block.input_layernorm(x).to(dtype)
    attended = block.self_attn(normed, attention_mask=_in_dtype(attention_mask, dtype), freqs_cis=freqs_cis, **rest)
    attended, *cache = attended if isinstance(attended, tuple) else (attended,)
    x = x + attended
    x = x + block.mlp(block.post_attention_layernorm(x).to(dtype))
    return (x, *cache) if cache else x


def _t5_self_attention(
    dtype: torch.dtype,
    layer: T5LayerSelfAttention,
    x: Tensor,
    mask: Tensor | None = None,
    past_bias: Tensor | None = None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    attended, past_bias = layer.SelfAttention(layer.layer_norm(x).to(dtype), _in_dtype(mask, dtype), past_bias, *rest)
    return x + attended, past_bias


def _t5_feed_forward(dtype: torch.dtype, layer: T5LayerFF, x: Tensor) -> Tensor:
    return x + layer.DenseReluDense(layer.layer_norm(x).to(dtype))


FORWARDS: dict[type[nn.Module], Forward] = {
    CLIPLayer: _clip_layer,
    LlamaBlock: _llama_block,
    T5LayerSelfAttention: _t5_self_attention,
    T5LayerFF: _t5_feed_forward,
}


def _recomputed(compute: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    if not x.requires_grad:
        return compute(x, *args, **kwargs)
    return checkpoint(compute, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _in_dtype(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
