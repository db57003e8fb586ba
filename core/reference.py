"""The reference pass: the network is called on an image prompt, to record keys and values that the LoRA adapts.

The trainable copy is the same diffusion model, called again with other hooks. So there is no second set of weights, and
a user's LoRA, offloading or fp8 weights apply to it as well.

The LoRA adapts the keys and values that are recorded. It does not change the layer's output, so the hidden states do
not depend on the LoRA, and no gradient goes through the pass. The ablation "LoRA in the whole pass" of
`bench/quality` measures the alternative.

Keys are the frozen keys plus the LoRA's product. Values are the LoRA's product alone. `lora_B` of a fresh adapter is
zero, so its values are zero and it adds nothing.
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
    """Raised when all wanted keys and values are in the bank. The rest of the pass is not needed.

    It is not an error, like StopIteration, and so its name does not end in Error.
    """


class ReferenceKV(NamedTuple):
    """Keys and values of a batch of references at one layer, and the layer's height and width in tokens."""

    kv: KV  # (b, height*width, heads*d)
    height: int
    width: int


class KVRecorder:
    """Makes one call of the network a reference pass. The attention layers call `at`.

    Afterwards `bank` maps each layer in `wanted` to its keys and values. `select` can reduce them at once, to save
    memory. At the layer `stop_at`, the call ends with ReferencePassComplete. `positions` is applied to the keys. With
    `narrow_values`, the values are kept at the LoRA's rank: (b, m, r).
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
        """Record keys and values, and return the layer's own self-attention. -> (b, n, heads*d)"""
        self.record(site)
        return site.self_attention()

    def record(self, site: Site) -> None:
        if site.key in self.wanted:
            self.bank[site.key] = self._select(ReferenceKV(self.project_keys_values(site), site.height, site.width))
        if site.key == self._stop_at:
            raise ReferencePassComplete

    def project_keys_values(self, site: Site) -> KV:
        """k_r = (W_k + dW_k) z_r and v_r = dW_v z_r. The site's keys are W_k z_r already. -> (b, m, heads*d) each"""
        assert site.hidden is not None, "a reference pass keeps what the projections read"
        k, to_v = self._deltas[site.key, "to_k"](site.hidden), self._deltas[site.key, "to_v"]
        v = to_v.narrow(site.hidden) if self._narrow_values else to_v(site.hidden)
        return KV(site.placed(site.picture_keys + k, self._positions), v)


def run_reference_pass(call: Callable[[], Any], recorder: KVRecorder) -> dict[BlockKey, Any]:
    """Call the network until the recorder is done, and return the bank."""
    try:
        call()
    except ReferencePassComplete:
        pass
    return recorder.bank


def select_tokens(kv: KV, row: int, kept: Tensor | None) -> KV:
    """Select one reference of a batch, without its masked-out tokens. -> (1, m, heads*d) each

    kept (n,) bool, on the CPU, because counting them on a GPU would wait for it.
    """
    k, v = kv.k[row : row + 1], kv.v[row : row + 1]
    if kept is None:
        return KV(k, v)
    indices = torch.nonzero(kept.cpu()).flatten().to(k.device)
    return KV(k.index_select(1, indices), v.index_select(1, indices))
