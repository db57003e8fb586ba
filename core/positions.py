"""Positions between a picture and its references, in networks that rotate queries and keys by them.

Diffusion transformers turn every pair of neighbouring numbers of a query or key by an angle that says where its token
stands (rotary positions; Su et al., 2021, arXiv 2104.09864). A reference was read elsewhere, and possibly at another
size and beside a text of another length, so what its keys carry cannot be met by a picture's queries as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

# none: both rotations are undone, and only content decides, as in a UNet.
# same: the reference lies on the same grid as the picture, in the same place of the sequence.
# index: the same grid, as another picture beside it, which is how models that edit are shown their references.
PositionRule = Literal["none", "same", "index"]
POSITION_RULES: tuple[str, ...] = get_args(PositionRule)


@dataclass(frozen=True, eq=False)
class Rotation:
    """By what a picture's tokens were rotated at one layer.

    matrices (1 or b, m, pairs, 2, 2), one for each pair of a head's numbers. The first `index_pairs` of them say of
    which picture a token is, and how long the text before it is; the others, where in the picture it lies.
    next_index (index_pairs, 2, 2): what turns the first to another picture.
    """

    matrices: Tensor
    index_pairs: int
    next_index: Tensor

    def undone(self, x: Tensor, heads: int) -> Tensor:
        """Queries or keys of the picture without their positions. (b, m, heads*d) -> (b, m, heads*d)"""
        return _rotated(x, self.matrices.mT, heads)

    def of_queries(self, x: Tensor, heads: int, rule: PositionRule) -> Tensor:
        """The picture's queries as references expect them: without the position that depends on the text's length."""
        if rule == "none":
            return self.undone(x, heads)
        index = self.matrices[:, :, : self.index_pairs].mT
        return _rotated(x, torch.cat([index, _identity_like(self.matrices[:, :, self.index_pairs :])], dim=2), heads)

    def of_keys(self, x: Tensor, heads: int, rule: PositionRule) -> Tensor:
        """Keys without positions, of a picture that is a reference, at the positions where queries meet them."""
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
