"""A Site for joint attention over text and picture, by ComfyUI's attention override.

Diffusion transformers call ComfyUI's attention with queries and keys after norm and rotary embedding. The override is
not told its layer. So every layer of a call gets its own options, with its own override.
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
    """Height and width of the picture in tokens."""

    height: int
    width: int

    @classmethod
    def of_latent(cls, size: tuple[int, int], patch_size: int) -> Grid:
        """Networks pad a latent to whole patches. size: (h, w)"""
        return cls(*(-(-side // patch_size) for side in size))

    @property
    def tokens(self) -> int:
        return self.height * self.width


@dataclass(frozen=True, eq=False)
class JointAttention:
    """Computes one layer's attention in place of the host's, for one call."""

    at: AtSite
    key: BlockKey
    grid: Grid
    first: Callable[[int], int]  # from the number of tokens to the index of the picture's first token
    rotation: Callable[[slice], Rotation | None]
    hidden: Callable[[slice], Tensor] | None  # of these tokens, before the projections; None: not needed

    def options(self, options: TransformerOptions) -> TransformerOptions:
        """The options for this layer. An override of another pack is still called."""
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
    """The host's attention without a mask, with the override of another pack, if there is one."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return optimized_attention(q, k, v, heads, transformer_options=options)

    return attend


def next_index(embedder: EmbedND, axes: int, shift: float, device: torch.device) -> Tensor:
    """The rotation from a picture to the next one, by the network's positions. -> (pairs of the first axis, 2, 2)"""
    ids = torch.zeros(1, 1, axes, device=device)
    ids[..., 0] = shift
    return embedder(ids).reshape(-1, 2, 2)[: embedder.axes_dim[0] // 2]
