"""The basic types: the address of an attention layer, and its keys and values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockKey(NamedTuple):
    """Address of one transformer block.

    In a UNet, it is named as in ComfyUI's patches. In other networks, by the list of blocks that holds it.
    """

    stage: str  # "input", "middle" or "output"; or the list's name, such as "layers" or "double_blocks"
    index: int  # place in that stage's list of blocks  # pyright: ignore[reportIncompatibleMethodOverride]
    depth: int = 0  # index in the spatial transformer of a UNet's block

    def __str__(self) -> str:
        return f"{self.stage} {self.index}.{self.depth}"


class KV(NamedTuple):
    """Keys and values of one self-attention, heads not split: (b, n, heads*d) each."""

    k: Tensor
    v: Tensor


KVBank = dict[BlockKey, KV]
