"""Find the self-attention layers of a UNet with Stable Diffusion's layout.

Only names and sizes are read. Weights are not touched: they may be offloaded, or in another precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from .kv import BlockKey


class SelfAttentionLayer(NamedTuple):
    """One self-attention layer (`attn1`): its block key, module path, and sizes of input and output."""

    key: BlockKey
    path: str  # "input_blocks.1.1.transformer_blocks.0.attn1"
    query_dim: int
    inner_dim: int


def self_attention_layers(
    unet: nn.Module, originals: Mapping[str, nn.Module] | None = None
) -> tuple[SelfAttentionLayer, ...]:
    """List the self-attention layers of a UNet in the order of the forward pass.

    originals: modules by path, as they were before another node replaced them.
    Empty if the module has no transformer blocks in `input_blocks`, `middle_block` and `output_blocks`.
    """
    found: list[SelfAttentionLayer] = []
    for key, path, block in _transformer_blocks(unet):
        if not getattr(block, "disable_self_attn", False):
            attention: Any = (originals or {}).get(f"{path}.attn1", block.attn1)
            to_q = attention.to_q
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
