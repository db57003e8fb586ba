"""The tiny UNet's self-attentions as sites. The tiny UNet has the host's patches."""

from typing import Any

from torch import Tensor

from sa_inject.core.attention import differentiable_attention
from sa_inject.core.kv import BlockKey
from sa_inject.core.site import AtSite, Site


def options_at_sites(blocks, at: AtSite, attend=differentiable_attention) -> dict[str, Any]:
    """Options for one call of a TinyUNet in which `at` computes the self-attention of these blocks."""

    def keep(hidden: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]):
        options["sa_inject_hidden"] = hidden
        return hidden, context, value

    def replacement(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        key = BlockKey(*options["block"], options["block_index"])
        height, width = options["activations_shape"][-2:]
        rows = options["original_shape"][0]
        return at(Site(key, q, k, v, options["n_heads"], height, width, attend, rows, options["sa_inject_hidden"]))

    return {"patches": {"attn1_patch": [keep]}, "patches_replace": {"attn1": dict.fromkeys(blocks, replacement)}}
