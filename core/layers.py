"""Finds the self-attention layers of a UNet that follows the layout of Stable Diffusion's.

The walk reads names and sizes only; weights are never touched, because they may live elsewhere, in another
precision, or behind a cast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from .kv import BlockKey


class SelfAttentionLayer(NamedTuple):
    """One `attn1`: its address, its module path, and its sizes."""

    key: BlockKey
    path: str  # "input_blocks.1.1.transformer_blocks.0.attn1"
    query_dim: int
    inner_dim: int


def self_attention_layers(
    unet: nn.Module, originals: Mapping[str, nn.Module] | None = None
) -> tuple[SelfAttentionLayer, ...]:
    """List every self-attention of a UNet in the order in which a forward pass meets them.

    originals: by its path, what a module was before somebody put another into its place.
    Empty when the module has no `input_blocks`, `middle_block` and `output_blocks` with transformer blocks inside.
    """
    found = []
    for key, path, block in _transformer_blocks(unet):
        if not getattr(block, "disable_self_attn", False):
            to_q = (originals or {}).get(f"{path}.attn1", block.attn1).to_q
            found.append(SelfAttentionLayer(key, f"{path}.attn1", to_q.in_features, to_q.out_features))
    return tuple(found)


def _transformer_blocks(unet: nn.Module) -> Iterator[tuple[BlockKey, str, nn.Module]]:
    for stage, index, path, block in _unet_blocks(unet):
        for name, child in block.named_children():
            for depth, transformer_block in enumerate(getattr(child, "transformer_blocks", ())):
                yield (
                    BlockKey(stage, index, depth),
                    f"{path}.{name}.transformer_blocks.{depth}",
                    transformer_block,
                )


def _unet_blocks(unet: nn.Module) -> Iterator[tuple[str, int, str, nn.Module]]:
    for index, block in enumerate(getattr(unet, "input_blocks", ())):
        yield "input", index, f"input_blocks.{index}", block
    middle = getattr(unet, "middle_block", None)
    if middle is not None:
        yield "middle", 0, "middle_block", middle
    for index, block in enumerate(getattr(unet, "output_blocks", ())):
        yield "output", index, f"output_blocks.{index}", block
