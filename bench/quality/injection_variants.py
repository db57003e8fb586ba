"""Other keys and values to record, and another way to inject them, for the ablations.

Import only after the host has started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sa_inject.core.attention import differentiable_attention
from sa_inject.core.injection import Reference
from sa_inject.core.kv import KV
from sa_inject.core.reference import KVRecorder
from sa_inject.core.site import Site

from .adapted import WholePass


class BaseProjections(WholePass):
    """Records keys and values of the frozen projections, for hidden states that the LoRA has changed, as in BootPIG."""

    def project_keys_values(self, site: Site) -> KV:
        return KV(site.k, site.v)


class WholeValues(KVRecorder):
    """Records values of the frozen projection plus the LoRA, which are not zero before training."""

    def project_keys_values(self, site: Site) -> KV:
        projected = super().project_keys_values(site)
        return projected._replace(v=site.v + projected.v)


def concatenated(site: Site, references: Sequence[Reference]) -> Tensor:
    """One softmax over own and reference tokens, in place of core's `inject`. All references have the same rows."""
    rows = {id(reference.rows): reference.rows for reference in references}
    assert len(rows) <= 1, "subjects in rows of their own are not concatenated"
    if not references:
        return site.self_attention()
    (rows,) = rows.values()
    if rows is None:
        return in_one_softmax(site.q, KV(site.k, site.v), references, site.heads)
    out = site.self_attention()
    out[rows] = in_one_softmax(site.q[rows], KV(site.k[rows], site.v[rows]), references, site.heads)
    return out


def in_one_softmax(q: Tensor, own: KV, references: Sequence[Reference], heads: int) -> Tensor:
    """A bias gives the reference tokens together the same weight as the own tokens, for any number of pictures."""
    keys, values, biases = [own.k], [own.v], [q.new_zeros(own.k.shape[1])]
    for reference in references:
        k, v = (x.expand(q.shape[0], *x.shape[1:]).to(q) for x in reference.kv)
        keys.append(k)
        values.append(v)
        biases.append(q.new_full((k.shape[1],), math.log(reference.weight * own.k.shape[1] / k.shape[1])))
    return differentiable_attention(q, torch.cat(keys, 1), torch.cat(values, 1), heads, torch.cat(biases)[None])
