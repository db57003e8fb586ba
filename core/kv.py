"""The vocabulary of the injection: where an attention sits, and what it hands over."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockKey(NamedTuple):
    """Address of one transformer block, as ComfyUI's patches spell it."""

    stage: str  # "input", "middle" or "output"
    index: int  # place in that stage's list of blocks
    depth: int  # place in the spatial transformer

    def __str__(self) -> str:
        return f"{self.stage} {self.index}.{self.depth}"


class KV(NamedTuple):
    """Keys and values of one self-attention, heads not split: (b, n, heads*d) each."""

    k: Tensor
    v: Tensor


KVBank = dict[BlockKey, KV]
