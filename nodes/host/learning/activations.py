"""How much a network stores for the backward pass, computed from the sizes of its layers.

The numbers are values that autograd stores for one row, with the layers of this folder. Frozen linear layers and
convolutions store none. Norms, gates and activations store their input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample
from torch import nn

from ....core.layers import SelfAttentionLayer
from ..networks.registry import is_transformer
from .transformer_blocks import BLOCKS

# What a block of a diffusion transformer keeps, for every output of its linear layers: norms, modulations, rotated
# queries and keys, and gates. It was measured with the blocks of Z-Image and Flux.
KEPT_PER_OUTPUT = 1.6
# What one block needs in its own backward pass beside what it keeps.
UNET_WORK, TRANSFORMER_WORK = 1.8, 1.5


class Activations(NamedTuple):
    """Numbers of values for one row."""

    kept: float
    work: float  # of the largest block in its own backward pass


def activations(
    network: Any,
    layers: Sequence[SelfAttentionLayer],
    height: int,
    width: int,
    text_tokens: int,
    checkpointing: bool,
) -> Activations:
    """Of a call of the network with a reference of the same size, which has been read. Sizes are of the latent.

    Layers before the first one with a gradient keep nothing.
    """
    if is_transformer(network):
        return _transformer_activations(network, layers, height * width, text_tokens, checkpointing)
    return _unet_activations(network, height, width, text_tokens, checkpointing)


def text_activations(encoder: nn.Module, layers: list[nn.Module], tokens: int, checkpointing: bool) -> float:
    """Of the text encoders' layers, for one text of so many tokens."""
    outputs = [_outputs(layer) * tokens for layer in layers]
    if not checkpointing or not outputs:
        return sum(outputs)
    inputs = sum(_width(layer) * tokens for layer in layers)
    return inputs + max(outputs)


def _unet_activations(unet: Any, height: int, width: int, text_tokens: int, checkpointing: bool) -> Activations:
    kept, largest, has_gradient = 0.0, 0.0, False
    for stage in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        for module in stage:
            pixels = height * width
            if isinstance(module, SpatialTransformer):
                has_gradient = True
                kept += module.in_channels * pixels  # of its norm
                for block in module.transformer_blocks:
                    whole = _unet_block(block, pixels, text_tokens)
                    kept += block.norm1.normalized_shape[0] * pixels if checkpointing else whole
                    kept += _recorded(block.attn1.to_k.in_features, block.attn1.to_k.out_features, pixels)
                    largest = max(largest, whole)
            elif isinstance(module, ResBlock) and has_gradient:
                whole = (module.channels + module.out_channels) * pixels
                kept += module.channels * pixels if checkpointing else whole
                largest = max(largest, whole)
            elif isinstance(module, Downsample):
                height, width = -(-height // 2), -(-width // 2)
            elif isinstance(module, Upsample):
                height, width = 2 * height, 2 * width
    kept += unet.model_channels * height * width  # of the last norm
    return Activations(kept, UNET_WORK * largest + (largest if checkpointing else 0.0))


def _unet_block(block: Any, tokens: int, text_tokens: int) -> float:
    """Three norms, queries, keys, values and results of three attentions, and the gate."""
    width, inner = block.attn1.to_q.in_features, block.attn1.to_q.out_features
    attentions = (4 + 1 + 2) * inner * tokens + 2 * inner * text_tokens  # its own, the reference's, the text's
    return 3 * width * tokens + attentions + _outputs(block.ff.net[0]) * tokens


def _recorded(width: int, inner: int, tokens: int) -> int:
    """Of a reference at one layer: what the LoRA reads, keys and values."""
    return (width + 2 * inner) * tokens


def _transformer_activations(
    network: Any, layers: Sequence[SelfAttentionLayer], pixels: int, text_tokens: int, checkpointing: bool
) -> Activations:
    picture = -(-pixels // network.patch_size**2)
    tokens = picture + text_tokens
    recorded = sum(_recorded(layer.query_dim, layer.inner_dim, picture) for layer in layers)
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    whole = [KEPT_PER_OUTPUT * _outputs(block) * tokens for block in blocks]
    if checkpointing:
        inputs = sum(_width(block) * tokens for block in blocks)
        return Activations(inputs + recorded, (1 + TRANSFORMER_WORK) * max(whole))
    return Activations(sum(whole) + recorded, TRANSFORMER_WORK * max(whole))


def _outputs(module: nn.Module) -> int:
    """Of all linear layers inside, for one token. Of two streams of tokens that take turns, one counts."""
    streams = 2 if hasattr(module, "txt_attn") else 1
    linears = [part for name, part in module.named_modules() if isinstance(part, nn.Linear) and "mod" not in name]
    return sum(int(linear.out_features) for linear in linears) // streams


def _width(module: nn.Module) -> int:
    """Values of a token that goes into a layer."""
    first = next(part for name, part in module.named_modules() if isinstance(part, nn.Linear) and "mod" not in name)
    return int(first.in_features)
