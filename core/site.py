"""One call of one attention layer, of any kind of network: what recording and injecting need to know.

The file of each network creates sites from the arguments of its host's hooks. Nothing else depends on the network.
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
    """One call of one attention layer: queries, keys and values, and which tokens are the picture's.

    In a UNet's self-attention, all tokens are the picture's, and there are no positions. In a diffusion transformer,
    the sequence also contains text and padding, and queries and keys are rotated by their positions.
    """

    key: BlockKey
    q: Tensor  # (b, n, heads*d) of the whole sequence; k and v have the same shape
    k: Tensor
    v: Tensor
    heads: int
    height: int  # of the layer, in tokens of the picture
    width: int
    attend: Attention  # the host's kernel, or the one that replaces it
    rows: int | None = None  # of the network's call; the attention may have more or fewer. None: not known
    hidden: Tensor | None = None  # (b, m, width) input of the projections, for the picture's m tokens. None: not stored
    tokens: slice | None = None  # the picture's m of the n tokens. None: all
    rotation: Rotation | None = None  # of the picture's queries and keys. None: no positions
    own: Callable[[], Tensor] | None = None  # computes the layer's own attention. None: `attend` to the own tokens

    def picture_queries(self, rule: PositionRule = "none") -> Tensor:
        """The queries that attend to references. -> (b, m, heads*d)"""
        q = self.q if self.tokens is None else self.q[:, self.tokens]
        return q if self.rotation is None else self.rotation.of_queries(q, self.heads, rule)

    @property
    def picture_keys(self) -> Tensor:
        """The picture's keys without their positions. -> (b, m, heads*d)"""
        k = self.k if self.tokens is None else self.k[:, self.tokens]
        return k if self.rotation is None else self.rotation.undone(k, self.heads)

    def placed(self, keys: Tensor, rule: PositionRule = "none") -> Tensor:
        """Unrotated keys of a reference, rotated as `rule` says. (b, m, heads*d) -> (b, m, heads*d)"""
        return keys if self.rotation is None else self.rotation.of_keys(keys, self.heads, rule)

    @property
    def has_whole_grid(self) -> bool:
        """Whether there is one token for each cell of the grid. False if tokens were merged or removed."""
        n = self.q.shape[1]
        m = n if self.tokens is None else len(range(*self.tokens.indices(n)))
        return m == self.height * self.width

    def self_attention(self) -> Tensor:
        """The layer's own attention, without injection. -> (b, n, heads*d)"""
        return self.attend(self.q, self.k, self.v, self.heads) if self.own is None else self.own()

    def of_rows(self, rows: slice) -> Site:
        """The same call for some rows only."""
        hidden = None if self.hidden is None else self.hidden[rows]
        return dataclasses.replace(self, q=self.q[rows], k=self.k[rows], v=self.v[rows], hidden=hidden)


AtSite = Callable[[Site], Tensor]  # replaces an attention: a site -> (b, n, heads*d)
