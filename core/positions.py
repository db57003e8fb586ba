"""Positions of references, in networks with rotary position embeddings.

Diffusion transformers rotate each pair of numbers of a query or key by an angle that encodes the token's position.
These are rotary position embeddings (Su et al., 2021, arXiv 2104.09864). The reference pass may have another size, and
a text of another length, than the main call. So its keys are rotated for other positions than the queries that attend
to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

# none: both rotations are removed, and only content counts, as in a UNet.
# same: the reference is at the same positions as the picture.
# index: the same grid, with the index of another picture. Editing models get their references like this.
PositionRule = Literal["none", "same", "index"]
POSITION_RULES: tuple[str, ...] = get_args(PositionRule)


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of a picture's queries and keys at one layer.

    matrices (1 or b, m, pairs, 2, 2), one for each pair of a head's numbers. The first `index_pairs` encode the index
    of the picture and the length of the text before it. The others encode the position in the picture.
    next_index (index_pairs, 2, 2): the rotations for the index of another picture.
    """

    matrices: Tensor
    index_pairs: int
    next_index: Tensor

    def undone(self, x: Tensor, heads: int) -> Tensor:
        """Queries or keys of the picture without their rotation. (b, m, heads*d) -> (b, m, heads*d)"""
        return _rotated(x, self.matrices.mT, heads)

    def of_queries(self, x: Tensor, heads: int, rule: PositionRule) -> Tensor:
        """Rotate the picture's queries as references need them: without the part that depends on the text's length.

        (b, m, heads*d) -> (b, m, heads*d)
        """
        if rule == "none":
            return self.undone(x, heads)
        index = self.matrices[:, :, : self.index_pairs].mT
        return _rotated(x, torch.cat([index, _identity_like(self.matrices[:, :, self.index_pairs :])], dim=2), heads)

    def of_keys(self, x: Tensor, heads: int, rule: PositionRule) -> Tensor:
        """Rotate a reference's unrotated keys for these queries. (b, m, heads*d) -> (b, m, heads*d)"""
        if rule == "none":
            return x
        index = _identity_like(self.matrices[:, :, : self.index_pairs])
        if rule == "index":
            index = self.next_index.to(index).expand_as(index)
        return _rotated(x, torch.cat([index, self.matrices[:, :, self.index_pairs :]], dim=2), heads)


def _rotated(x: Tensor, matrices: Tensor, heads: int) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], heads, -1, 1, 2)  # (b, m, heads, pairs, 1, 2)
    return (matrices[:, :, None].float() * pairs).sum(-1).flatten(2).to(x.dtype)


def _identity_like(matrices: Tensor) -> Tensor:
    return torch.eye(2, dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
