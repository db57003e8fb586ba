"""A UNet's self-attentions as sites, by ComfyUI's patches: `attn1_patch` and the replacements of `attn1`."""

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

# The host gives every transformer block a dictionary of its own that both hooks of that block see, so what one hook
# hands to the next lives there, and threads cannot mix it up.
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

    They are a copy of the given ones, and hold until the context ends. With `keeps_hidden` every site says what its
    projections have read; a call that is so used can have no other patches on what they read.
    """
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {})
    if keeps_hidden:
        patches = {**patches, "attn1_patch": [store_hidden_states]}
    attn1 = {**replaced.get("attn1", {}), **dict.fromkeys(map(tuple, blocks), partial(call_at_site, at))}
    yield {**options, "patches": patches, "patches_replace": {**replaced, "attn1": attn1}}


def replaced_blocks(options: TransformerOptions, blocks: Collection[BlockKey]) -> frozenset[BlockKey]:
    """Those of the blocks whose self-attention another pack computes in this call."""
    attn1 = options.get("patches_replace", {}).get("attn1", {})
    return frozenset(key for key in blocks if attn1.get(tuple(key)) or attn1.get((key.stage, key.index)))


def call_at_site(at: AtSite, q: Tensor, k: Tensor, v: Tensor, extra_options: TransformerOptions) -> Tensor:
    """A replacement of a self-attention, which makes a site of what it is given."""
    if q.shape[0] != k.shape[0]:
        # Tiling nodes fold tiles of q into the batch and leave k and v whole; the kernels would reshape them so.
        k, v = (x.reshape(q.shape[0], -1, x.shape[-1]) for x in (k, v))
    (stage, index), (height, width) = extra_options["block"], extra_options["activations_shape"][-2:]
    rows = extra_options.get("original_shape")
    # The kernel finds the override of another pack in the options that the host gives each layer.
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
    """A patch that changes nothing, and keeps what the projections of a self-attention are about to read."""
    extra_options[HIDDEN_STATES_KEY] = hidden
    return hidden, context, value
