"""Self-attention injection: the frozen network's queries meet the reference's keys and values beside its own.

Li and Sun, IMAVIS 151 (2024) 105296, describe injecting the copy's self-attention features; that they are attended to
in a softmax of their own and added is our reading of it. A fresh adapter hands over values of zero, so training begins
at the base model and not at an attention that has to be unlearned. Concatenating to the network's own keys and values
begins there; trained, it draws as well (ablation "concatenated" of bench/quality.py), and it needs a bias on tokens.
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
    """Tokens to attend to, and how much comes of it.

    kv (1 or b, m, heads*d). `weight` multiplies what is added. query_mask (n,) in 0..1 says how much each query is
    given; key_mask (b, m) bool, for training, which tokens are there at all, at least one in a row. `rows` are those
    of the site that attend to it; None: all.
    """

    kv: KV
    weight: float = 1.0
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    rows: slice | Tensor | None = None
    positions: PositionRule = "none"
    widen: Callable[[Tensor], Tensor] | None = None


def inject(site: Site, references: Sequence[Reference]) -> Tensor:
    """Add what each reference gives the picture's queries to what they have made of the network's own tokens.

    out = self-attention + sum over references of weight * query_mask * softmax(q k_r^T / sqrt(d)) v_r

    -> (b, n, heads*d). The network's own attention is one call for all rows, as without us; each reference is one more,
    for the rows that see it. What is added is added in place, unless a gradient goes through it.
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
    """One reference's term of that sum, before its weight: whoever adds it can weigh it for nothing.

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
