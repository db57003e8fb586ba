"""The reference pass: the network reads an image prompt, and hands over keys and values that the LoRA adapts.

It is an ordinary call of the same diffusion model with hooks of its own, so the "trainable copy" costs no second
set of weights, and whatever was done to the weights (a user's LoRA, offloading, fp8) holds for it too.

The LoRA acts on what a layer hands over, not on what it passes on to the next: what the pass computes of a picture does
not change while the LoRA learns, and no gradient has to go through it. Adapting the whole pass drew no better on the
subjects that were tried (ablation "LoRA in the whole pass" of bench/quality.py), at a third more work for each step.

Keys are those of the frozen network and the LoRA's share; values are the LoRA's share alone, so that a fresh adapter,
whose `lora_B` is zero, adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kv import KV, BlockKey
from .lora import LoRADeltas
from .positions import PositionRule
from .site import Site


class ReferencePassComplete(Exception):
    """Raised when the last wanted keys and values are in the bank: the rest of the pass would be thrown away.

    It is no error, as StopIteration is none, and is not named like one.
    """


class ReferenceKV(NamedTuple):
    """Keys and values of a batch of references at one layer, with the layer's height and width in tokens."""

    kv: KV  # (b, height*width, heads*d)
    height: int
    width: int


class KVRecorder:
    """Turns one call of the network into a reference pass, when its attention layers are computed by `at`.

    After the call `bank` holds what every layer in `wanted` handed over, or what `select` took of it there and then, so
    that the rest takes up no memory while the call goes on. At the layer `stop_at` the call ends with
    ReferencePassComplete. Keys get `positions`; with `narrow_values` the values are kept at the LoRA's rank.
    """

    def __init__(
        self,
        wanted: Collection[BlockKey],
        deltas: LoRADeltas,
        *,
        stop_at: BlockKey | None = None,
        select: Callable[[ReferenceKV], Any] = lambda recorded: recorded,
        positions: PositionRule = "none",
        narrow_values: bool = False,
    ) -> None:
        self.bank: dict[BlockKey, Any] = {}
        self.wanted = frozenset(wanted)
        self._deltas = deltas
        self._stop_at = stop_at
        self._select = select
        self._positions: PositionRule = positions
        self._narrow_values = narrow_values

    def at(self, site: Site) -> Tensor:
        """Record what the layer hands over, and attend as without us. -> (b, n, heads*d)"""
        self.record(site)
        return site.self_attention()

    def record(self, site: Site) -> None:
        if site.key in self.wanted:
            self.bank[site.key] = self._select(ReferenceKV(self.project_keys_values(site), site.height, site.width))
        if site.key == self._stop_at:
            raise ReferencePassComplete

    def project_keys_values(self, site: Site) -> KV:
        """k_r = (W_k + dW_k) z_r and v_r = dW_v z_r; the site's keys are what the frozen projection made of z_r."""
        assert site.hidden is not None, "a reference pass keeps what the projections read"
        k, to_v = self._deltas[site.key, "to_k"](site.hidden), self._deltas[site.key, "to_v"]
        v = to_v.narrow(site.hidden) if self._narrow_values else to_v(site.hidden)
        return KV(site.placed(site.picture_keys + k, self._positions), v)


def run_reference_pass(call: Callable[[], Any], recorder: KVRecorder) -> dict[BlockKey, Any]:
    """Call the network until the recorder has all it wants, and return the bank."""
    try:
        call()
    except ReferencePassComplete:
        pass
    return recorder.bank


def select_tokens(kv: KV, row: int, kept: Tensor | None) -> KV:
    """Take one reference out of a batch, without its masked-out tokens.

    kept (n,) bool, on the CPU, where counting them waits for no device -> (1, m, heads*d) each
    """
    k, v = kv.k[row : row + 1], kv.v[row : row + 1]
    if kept is None:
        return KV(k, v)
    places = torch.nonzero(kept.cpu()).flatten().to(k.device)
    return KV(k.index_select(1, places), v.index_select(1, places))
