"""Self-attention injection: the frozen UNet's queries meet the reference's keys and values beside its own.

Li and Sun, IMAVIS 151 (2024) 105296, describe injecting the copy's self-attention features; the concatenation of
keys and values is our reading of it, and the log-bias is DreamTuner's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .attention import Attention
from .kv import KV

EXCLUDED: float = -1.0e3  # a log weight whose exponential is zero, and which stays finite in half precision when scaled
CHANNEL_MULTIPLE: int = 8  # fused attention kernels want head widths that are multiples of this


class Reference(NamedTuple):
    """Tokens to attend to, and how much they count.

    kv (1 or b, m, heads*d). `weight` multiplies every token's share of the softmax: 1 is plain concatenation.
    key_mask (1 or b, m) in 0..1 weighs single tokens; query_mask (n,) in 0..1 says which queries may look.
    """

    kv: KV
    weight: float = 1.0
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.weight == 1.0 and self.key_mask is None and self.query_mask is None


def inject(q: Tensor, own: KV, references: Sequence[Reference], heads: int, attend: Attention) -> Tensor:
    """Attend to our own tokens and the references'.

    q (b, n, heads*d), own (b, n, heads*d), references (1 or b, m, heads*d) -> (b, n, heads*d)

    out = softmax(q [k, k_r]^T / sqrt(d) + [0, log(weight * key_mask * query_mask)]) [v, v_r]
    """
    b = q.shape[0]
    k = torch.cat([own.k, *(_rows(r.kv.k, b).to(own.k) for r in references)], dim=1)  # (b, n+m, heads*d)
    v = torch.cat([own.v, *(_rows(r.kv.v, b).to(own.v) for r in references)], dim=1)  # (b, n+m, heads*d)
    if all(r.is_plain for r in references):
        return attend(q, k, v, heads)
    return _attend_with_log_bias(q, k, v, own.k.shape[1], references, heads, attend)


def _attend_with_log_bias(
    q: Tensor, k: Tensor, v: Tensor, own_tokens: int, references: Sequence[Reference], heads: int, attend: Attention
) -> Tensor:
    """Add the bias as extra channels of q and k, so that no (n, n+m) mask is built and fused kernels still serve.

    The bias is a sum of products "something of the query" times "something of the key": one channel for the weights
    of the keys, and one for every reference that only some queries may see.
    q (b, n, heads*d), k and v (b, n+m, heads*d) -> (b, n, heads*d)
    """
    d = q.shape[-1] // heads
    query_channels = [torch.ones(q.shape[1], device=q.device)]  # (n,) each
    key_channels = [_key_bias(references, own_tokens, q)]  # (1 or b, n+m) each
    start = own_tokens
    for r in references:
        stop = start + r.kv.k.shape[1]
        if r.query_mask is not None:
            query_channels.append(_log(r.query_mask.to(q.device)))
            key_channels.append(_indicator(k.shape[1], start, stop, q))
        start = stop

    added = -(-(d + len(query_channels)) // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE - d
    width = d + added
    # The kernel divides by sqrt(width): give q what it takes away.
    q = _widen(q * math.sqrt(width / d), [c[None] * math.sqrt(width) for c in query_channels], heads, added)
    k = _widen(k, key_channels, heads, added)
    v = _widen(v, [], heads, added)
    out = attend(q, k, v, heads)  # (b, n, heads*width)
    return rearrange(rearrange(out, "b n (h w) -> b n h w", h=heads)[..., :d], "b n h d -> b n (h d)")


def _widen(x: Tensor, channels: list[Tensor], heads: int, added: int) -> Tensor:
    """Append channels, and zeros up to `added`, to every head. x (b, n, heads*d) -> (b, n, heads*(d+added))"""
    x = rearrange(x, "b n (h d) -> b n h d", h=heads)
    extra = [c.to(x)[..., None, None].expand(x.shape[0], -1, heads, 1) for c in channels]
    zeros = x.new_zeros(1, 1, 1, 1).expand(*x.shape[:3], added - len(channels))
    return rearrange(torch.cat([x, *extra, zeros], dim=-1), "b n h w -> b n (h w)")


def _key_bias(references: Sequence[Reference], own_tokens: int, like: Tensor) -> Tensor:
    """Log weight of every key: zero for our own. -> (1 or b, n+m)"""
    parts = [torch.zeros(1, own_tokens, device=like.device)]
    for r in references:
        bias = torch.full((1, r.kv.k.shape[1]), math.log(r.weight), device=like.device)
        if r.key_mask is not None:
            bias = (bias + _log(r.key_mask.to(like.device))).clamp(min=EXCLUDED)
        parts.append(bias)
    rows = max(p.shape[0] for p in parts)
    return torch.cat([_rows(p, rows) for p in parts], dim=1)


def _indicator(length: int, start: int, stop: int, like: Tensor) -> Tensor:
    """One between start and stop, zero elsewhere. -> (1, length)"""
    return F.pad(torch.ones(1, stop - start, device=like.device), (start, length - stop))


def _log(weight: Tensor) -> Tensor:
    return weight.float().clamp(min=math.exp(-20.0)).log().where(weight > 0, torch.full_like(weight.float(), EXCLUDED))


def _rows(x: Tensor, b: int) -> Tensor:
    return x if x.shape[0] == b else x.expand(b, *x.shape[1:])
