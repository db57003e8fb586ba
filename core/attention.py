"""The interface of an attention kernel, and an implementation with torch."""

from __future__ import annotations

from typing import Protocol

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


class Attention(Protocol):
    """Multi-head attention without a mask, scaled by 1 / sqrt(d).

    q (b, n, heads*d), k and v (b, m, heads*d) -> (b, n, heads*d)
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor: ...


def differentiable_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, key_mask: Tensor | None = None) -> Tensor:
    """Attention with torch's kernel, which is differentiable on every device.

    q (b, n, heads*d), k and v (b, m, heads*d) -> (b, n, heads*d)

    key_mask (b, m): bool, False leaves a token out; or float, added to the logits.
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, None if key_mask is None else key_mask[:, None, None])
    return rearrange(out, "b h n d -> b n (h d)")
