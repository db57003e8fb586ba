"""Self-attention injection: a second attention to the reference's keys and values is added to the self-attention.

The method follows Li and Sun, IMAVIS 151 (2024) 105296: self-attention features of a copy are injected. A separate
softmax, whose result is added, is our interpretation. Values of a fresh adapter are zero, so training starts at the
base model. The alternative is to concatenate the reference's tokens to the network's own, in one softmax. It changes
the attention before training, and needs a bias for the numbers of tokens. The ablation "concatenated" of
`bench/quality` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .attention import differentiable_attention
from .kv import KV
from .positions import PositionRule
from .site import Site


class Reference(NamedTuple):
    """The keys and values of one reference at one layer, and how they are added.

    kv (1 or b, m, heads*d). `weight` multiplies what is added.
    query_mask (n,) in 0..1 multiplies it for each query. None: 1.
    key_mask (b, m) bool, for training: False leaves a token out. At least one token per row is True.
    `rows` are the rows of the site that use the reference. None: all.
    `positions` is the position rule of the adapter.
    `widen` maps values that are stored at LoRA rank (b, m, r) to (b, m, heads*d). None: they have full width.
    """

    kv: KV
    weight: float = 1.0
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    rows: slice | Tensor | None = None
    positions: PositionRule = "none"
    widen: Callable[[Tensor], Tensor] | None = None


def inject(site: Site, references: Sequence[Reference]) -> Tensor:
    """Self-attention with added references, which is the formula of the method. -> (b, n, heads*d)

        out = softmax(q k^T / sqrt(d)) v + sum over references of weight * query_mask * softmax(q k_r^T / sqrt(d)) v_r

    The network's own attention is one kernel call for all rows. Each reference is one more call, for its rows only. The
    sum is computed in place, unless it needs a gradient.
    """
    out = site.self_attention()
    rules: set[PositionRule] = {reference.positions for reference in references}
    queries = {rule: site.picture_queries(rule) for rule in rules}
    for reference in references:
        added = attend_to_reference(queries[reference.positions], reference, site)
        if out.requires_grad or added.requires_grad:
            out = out.clone()
        picture = out if site.tokens is None else out[:, site.tokens]
        if isinstance(reference.rows, Tensor):
            picture.index_add_(0, reference.rows, added.to(out), alpha=reference.weight)
        else:
            rows = picture if reference.rows is None else picture[reference.rows]
            rows.add_(added, alpha=reference.weight)
    return out


def attend_to_reference(queries: Tensor, reference: Reference, site: Site) -> Tensor:
    """One reference's term of the sum, without its weight. The weight is applied by the addition itself.

    queries (b, m, heads*d) -> (rows, m, heads*d)
    """
    q = queries if reference.rows is None else queries[reference.rows]
    kv = reference.kv if reference.widen is None else KV(reference.kv.k, reference.widen(reference.kv.v))
    k, v = (x.to(q).expand(q.shape[0], *x.shape[1:]) for x in kv)
    if reference.key_mask is None:
        out = site.attend(q, k, v, site.heads)
    else:
        out = differentiable_attention(q, k, v, site.heads, reference.key_mask)
    if reference.query_mask is not None:
        out = out * reference.query_mask.to(q)[:, None]
    return out
