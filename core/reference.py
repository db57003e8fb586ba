"""The reference pass: the UNet reads an image prompt, and hands over keys and values that the LoRA adapts.

It is an ordinary call of the same diffusion model with patches of its own, so the "trainable copy" costs no second
set of weights, and whatever was done to the weights (a user's LoRA, offloading, fp8) holds for it too.

The LoRA acts on what a layer hands over, not on what it passes on to the next: what the pass computes of a picture does
not change while the LoRA learns, and no gradient has to go through it. Adapting the whole pass drew no better on the
subjects that were tried (ablation "LoRA in the whole pass" of bench/quality.py), at a third more work for each step.

Keys are those of the frozen UNet and the LoRA's share; values are the LoRA's share alone, so that a fresh adapter,
whose `lora_B` is zero, adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import Attention
from .kv import KV, BlockKey
from .lora import LoRADeltas

# The host gives every transformer block a dictionary of its own that both hooks of that block see, so what one hook
# hands to the next lives there, and threads cannot mix it up.
HIDDEN_STATES_KEY = "sa_inject_hidden"


class ReferencePassComplete(Exception):
    """Raised when the last wanted keys and values are in the bank: the rest of the pass would be thrown away."""


class ReferenceKV(NamedTuple):
    """Keys and values of a batch of references at one layer, with the layer's height and width in tokens."""

    kv: KV  # (b, height*width, heads*d)
    height: int
    width: int


class ReferencePassHooks:
    """Patches that turn one UNet call into a reference pass.

    After the call `bank` holds what every layer in `wanted` handed over, or what `select` took of it there and then, so
    that the rest takes up no memory while the call goes on. With `stop_early` the call ends with ReferencePassComplete
    as soon as the last of them is there.
    """

    def __init__(
        self,
        wanted: Collection[BlockKey],
        last: BlockKey,
        deltas: LoRADeltas,
        attend: Attention,
        stop_early: bool = True,
        select: Callable[[ReferenceKV], Any] = lambda recorded: recorded,
    ) -> None:
        self.bank: dict[BlockKey, Any] = {}
        self.wanted = frozenset(wanted)
        self._last = last
        self._deltas = deltas
        self._attend = attend
        self._stop_early = stop_early
        self._select = select

    def transformer_options(self, blocks: Collection[BlockKey]) -> dict[str, Any]:
        """The private options of the reference pass; `blocks` are all self-attention layers of the UNet."""
        return {
            "patches": {"attn1_patch": [store_hidden_states]},
            "patches_replace": {"attn1": dict.fromkeys(blocks, self._attention)},
        }

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        self._record(k, v, extra_options)
        return self._attend(q, k, v, extra_options["n_heads"])

    def _record(self, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> None:
        key = block_key(extra_options)
        if key in self.wanted:
            height, width = extra_options["activations_shape"][-2:]
            recorded = ReferenceKV(self.project_keys_values(k, v, extra_options[HIDDEN_STATES_KEY], key), height, width)
            self.bank[key] = self._select(recorded)
        if self._stop_early and key == self._last:
            raise ReferencePassComplete

    def project_keys_values(self, k: Tensor, v: Tensor, hidden: Tensor, key: BlockKey) -> KV:
        """k_r = (W_k + dW_k) z_r and v_r = dW_v z_r; k and v are what the frozen projections made of z_r."""
        return KV(k + self._deltas[key, "to_k"](hidden), self._deltas[key, "to_v"](hidden))


def store_hidden_states(
    hidden: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """A patch that changes nothing, and keeps what the projections of a self-attention are about to read."""
    extra_options[HIDDEN_STATES_KEY] = hidden
    return hidden, context, value


def block_key(extra_options: dict[str, Any]) -> BlockKey:
    """Read the address of the current block from what the host passes to a patch."""
    stage, index = extra_options["block"]
    return BlockKey(stage, index, extra_options["block_index"])


def run_reference_pass(unet_call: Any, recorder: ReferencePassHooks) -> dict[BlockKey, Any]:
    """Call the UNet until the recorder has all it wants, and return the bank."""
    try:
        unet_call()
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
