"""One attention over text and picture together, as a site: by the host's override of attention.

Diffusion transformers call the host's attention with queries and keys that are normed and rotated already. The override
sees these, and nothing that says which layer it is; so every layer of a call is given an override of its own, in
options of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ....core.attention import Attention
from ....core.kv import BlockKey
from ....core.positions import Rotation
from ....core.site import AtSite, Site

if TYPE_CHECKING:
    from comfy.ldm.flux.layers import EmbedND

    from ..host_types import Arguments, TransformerOptions

OVERRIDE = "optimized_attention_override"


class Grid(NamedTuple):
    """The picture of a call in tokens."""

    height: int
    width: int

    @classmethod
    def of_latent(cls, size: tuple[int, int], patch_size: int) -> Grid:
        """Networks fill a latent up to whole patches."""
        return cls(*(-(-side // patch_size) for side in size))

    @property
    def tokens(self) -> int:
        return self.height * self.width


@dataclass(frozen=True, eq=False)
class JointAttention:
    """What computes one layer's attention in the place of the host's, for the length of one call."""

    at: AtSite
    key: BlockKey
    grid: Grid
    first: Callable[[int], int]  # place of the picture's first token among so many
    rotation: Callable[[slice], Rotation | None]
    hidden: Callable[[slice], Tensor] | None  # what the projections of these tokens have read, where it is wanted

    def options(self, options: TransformerOptions) -> TransformerOptions:
        """Options of the call for this layer alone. An override of another pack goes on being asked."""
        earlier = options.get(OVERRIDE)

        def override(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return self._compute(original, earlier, args, {**kwargs, "transformer_options": options})

        return {**options, OVERRIDE: override}

    def _compute(
        self,
        original: Callable[..., Tensor],
        earlier: Callable[..., Tensor] | None,
        args: tuple[Any, ...],
        kwargs: Arguments,
    ) -> Tensor:
        def own() -> Tensor:
            return original(*args, **kwargs) if earlier is None else earlier(original, *args, **kwargs)

        q, k, v, heads = args[:4]
        if kwargs.get("skip_reshape"):
            q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))  # (b, heads, n, d) -> (b, n, heads*d)
        first = self.first(q.shape[1])
        tokens = slice(first, first + self.grid.tokens)
        site = Site(
            key=self.key,
            q=q,
            k=k,
            v=v,
            heads=heads,
            height=self.grid.height,
            width=self.grid.width,
            attend=host_attention(kwargs["transformer_options"]),
            rows=q.shape[0],
            hidden=None if self.hidden is None else self.hidden(tokens),
            tokens=tokens,
            rotation=self.rotation(tokens),
            own=own,
        )
        return self.at(site)


def host_attention(options: TransformerOptions) -> Attention:
    """The host's attention kernel without a mask, with whatever override another pack put into the options."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return optimized_attention(q, k, v, heads, transformer_options=options)

    return attend


def next_index(embedder: EmbedND, axes: int, shift: float, device: torch.device) -> Tensor:
    """By what a network's own positions turn a token of the next picture. -> (pairs of the first axis, 2, 2)"""
    ids = torch.zeros(1, 1, axes, device=device)
    ids[..., 0] = shift
    return embedder(ids).reshape(-1, 2, 2)[: embedder.axes_dim[0] // 2]
