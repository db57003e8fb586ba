"""A UNet's self-attention layers as sites, by ComfyUI's patches: `attn1_patch`, and replacements of `attn1`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ....core.kv import BlockKey
from ....core.site import AtSite, Site

if TYPE_CHECKING:
    from ..host_types import TransformerOptions

# The key of the hidden states in a block's options. The host makes a dictionary for each block and passes it to both
# hooks, so threads do not share it.
HIDDEN_STATES_KEY = "sa_inject_hidden"


@contextmanager
def attending(
    network: nn.Module,
    options: TransformerOptions,
    at: AtSite,
    blocks: Collection[BlockKey],
    *,
    keeps_hidden: bool = False,
) -> Iterator[TransformerOptions]:
    """Options for one call of the network, in which `at` computes the self-attention of these blocks.

    The given options are not changed. keeps_hidden: each site has its hidden states. Then all other `attn1_patch`
    patches are left out of the call.
    """
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {})
    if keeps_hidden:
        patches = {**patches, "attn1_patch": [store_hidden_states]}
    attn1 = {**replaced.get("attn1", {}), **dict.fromkeys(map(tuple, blocks), partial(call_at_site, at))}
    yield {**options, "patches": patches, "patches_replace": {**replaced, "attn1": attn1}}


def replaced_blocks(options: TransformerOptions, blocks: Collection[BlockKey]) -> frozenset[BlockKey]:
    """The blocks whose self-attention another pack replaces in this call."""
    attn1 = options.get("patches_replace", {}).get("attn1", {})
    return frozenset(key for key in blocks if attn1.get(tuple(key)) or attn1.get((key.stage, key.index)))


def call_at_site(at: AtSite, q: Tensor, k: Tensor, v: Tensor, extra_options: TransformerOptions) -> Tensor:
    """A replacement of `attn1` that makes a Site and calls `at`. q (b, n, heads*d), k, v (b, m, heads*d)"""
    if q.shape[0] != k.shape[0]:
        # Tiling nodes reshape tiles of q into the batch, but not k and v. ComfyUI's kernels would do it here.
        k, v = (x.reshape(q.shape[0], -1, x.shape[-1]) for x in (k, v))
    (stage, index), (height, width) = extra_options["block"], extra_options["activations_shape"][-2:]
    rows = extra_options.get("original_shape")
    # With these options, the kernel calls the attention override of another pack.
    precision = extra_options.get("attn_precision")
    attend = partial(optimized_attention, attn_precision=precision, transformer_options=extra_options)
    return at(
        Site(
            key=BlockKey(stage, index, extra_options["block_index"]),
            q=q,
            k=k,
            v=v,
            heads=extra_options["n_heads"],
            height=height,
            width=width,
            attend=attend,
            rows=None if rows is None else rows[0],
            hidden=extra_options.get(HIDDEN_STATES_KEY),
        )
    )


def store_hidden_states(
    hidden: Tensor, context: Tensor, value: Tensor, extra_options: TransformerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """An `attn1_patch` that stores the hidden states before the projections, and changes nothing."""
    extra_options[HIDDEN_STATES_KEY] = hidden
    return hidden, context, value
