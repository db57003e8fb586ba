"""One call of one attention layer, whatever the network: all that recording and injecting have to know of it.

A network's own file makes sites out of what its host shows of a call. Nothing else depends on the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .attention import Attention
from .kv import BlockKey
from .positions import PositionRule, Rotation


@dataclass(frozen=True, eq=False)
class Site:
    """One call of one attention layer: what attends to what, and which part of it is a picture.

    In a UNet's self-attention everything is the picture, and there are no positions. In a diffusion transformer text
    and padding stand beside it, and queries and keys arrive rotated by their positions.
    """

    key: BlockKey
    q: Tensor  # (b, n, heads*d) of the whole sequence, and so are k and v
    k: Tensor
    v: Tensor
    heads: int
    height: int  # of the layer, in tokens of the picture
    width: int
    attend: Attention  # the network's own kernel, or what others have put into its place
    rows: int | None = None  # of the network's call; the attention may have others. None: not known
    hidden: Tensor | None = None  # (b, m, width) what the projections of the picture's m tokens read, where it was kept
    tokens: slice | None = None  # the picture's m among the n; None: all
    rotation: Rotation | None = None  # of the picture's queries and keys; None: there are no positions
    own: Callable[[], Tensor] | None = None  # what the network computes here; None: it attends to its own tokens

    def picture_queries(self, rule: PositionRule = "none") -> Tensor:
        """What asks the references. -> (b, m, heads*d)"""
        q = self.q if self.tokens is None else self.q[:, self.tokens]
        return q if self.rotation is None else self.rotation.of_queries(q, self.heads, rule)

    @property
    def picture_keys(self) -> Tensor:
        """The picture's keys without their positions. -> (b, m, heads*d)"""
        k = self.k if self.tokens is None else self.k[:, self.tokens]
        return k if self.rotation is None else self.rotation.undone(k, self.heads)

    def placed(self, keys: Tensor, rule: PositionRule = "none") -> Tensor:
        """Such keys as queries of other places and sizes meet them. (b, m, heads*d) -> (b, m, heads*d)"""
        return keys if self.rotation is None else self.rotation.of_keys(keys, self.heads, rule)

    @property
    def has_whole_grid(self) -> bool:
        """Whether the layer's height and width say where each token of the picture lies: none is merged or cut away."""
        n = self.q.shape[1]
        m = n if self.tokens is None else len(range(*self.tokens.indices(n)))
        return m == self.height * self.width

    def self_attention(self) -> Tensor:
        """What the network computes here without us. -> (b, n, heads*d)"""
        return self.attend(self.q, self.k, self.v, self.heads) if self.own is None else self.own()

    def of_rows(self, rows: slice) -> Site:
        """The same call, of some rows only."""
        hidden = None if self.hidden is None else self.hidden[rows]
        return dataclasses.replace(self, q=self.q[rows], k=self.k[rows], v=self.v[rows], hidden=hidden)


AtSite = Callable[[Site], Tensor]  # computes an attention in the network's place: a site -> (b, n, heads*d)
