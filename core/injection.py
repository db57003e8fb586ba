"""Self-attention injection: the frozen UNet's queries meet the reference's keys and values beside its own.

Li and Sun, IMAVIS 151 (2024) 105296, describe injecting the copy's self-attention features; that they are attended to
in a softmax of their own and added is our reading of it. A fresh adapter hands over values of zero, so training begins
at the base model and not at an attention that has to be unlearned. Concatenating to the UNet's own keys and values
begins there; trained, it draws as well (ablation "concatenated" of bench/quality.py), and it needs a bias on tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Attention, differentiable_attention
from .kv import KV


class Reference(NamedTuple):
    """Tokens to attend to, and how much comes of it.

    kv (1 or b, m, heads*d). `weight` multiplies what is added. query_mask (n,) in 0..1 says how much each query is
    given; key_mask (b, m) bool, for training, which tokens are there at all, at least one in a row.
    """

    kv: KV
    weight: float = 1.0
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None


def inject(
    self_attention_out: Tensor, q: Tensor, references: Sequence[Reference], heads: int, attend: Attention
) -> Tensor:
    """Add what each reference has to say to the queries, to what they have made of the UNet's own tokens.

    attended and q (b, n, heads*d), references (1 or b, m, heads*d) -> (b, n, heads*d)

    out = attended + sum over references of weight * query_mask * softmax(q k_r^T / sqrt(d)) v_r
    """
    for reference in references:
        self_attention_out = torch.add(
            self_attention_out, attend_to_reference(q, reference, heads, attend), alpha=reference.weight
        )
    return self_attention_out


def attend_to_reference(q: Tensor, reference: Reference, heads: int, attend: Attention) -> Tensor:
    """One reference's term of that sum, before its weight: whoever adds it can weigh it for nothing.
    -> (b, n, heads*d)"""
    k, v = (x.to(q).expand(q.shape[0], *x.shape[1:]) for x in reference.kv)
    if reference.key_mask is None:
        out = attend(q, k, v, heads)
    else:
        out = differentiable_attention(q, k, v, heads, reference.key_mask)
    if reference.query_mask is not None:
        out = out * reference.query_mask.to(q)[:, None]
    return out
