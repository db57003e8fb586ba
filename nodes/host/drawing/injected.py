"""The self-attention of the network while it is injected, for the length of one UNet call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....core.attention import Attention
from ....core.injection import Reference, attend_to_reference
from ....core.kv import BlockKey, KVBank
from ....core.reference import block_key, store_hidden_states
from .batched_reference import BatchedReferences
from .reference_pass import host_attention
from .sampling_run import Injection, SamplingRun

AttentionPatch = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
REPLACED = "another node replaces the self-attention there"


@dataclass(frozen=True, eq=False)
class Source:
    injection: Injection
    rows: Sequence[bool]  # for each row of the call, whether it sees this
    bank: KVBank


def with_injection(
    options: dict[str, Any], sources: Sequence[Source], run: SamplingRun, joined: Sequence[BatchedReferences]
) -> dict[str, Any]:
    """Copy the call's options and put the injection over every block that a bank covers."""
    patches = options.get("patches", {})
    if joined:
        patches = {**patches, "attn1_patch": [store_hidden_states]}
    replaced = options.get("patches_replace", {})
    attn1 = dict(replaced.get("attn1", {}))
    rows = InjectedRows(sources, len(sources[0].rows) + sum(len(p.prompt.pictures) for p in joined))
    for key in {key for source in sources for key in source.injection.blocks if key in source.bank or joined}:
        earlier = attn1.get(tuple(key)) or attn1.get((key.stage, key.index))
        attn1[tuple(key)] = InjectedAttention(rows, earlier, run, joined)
    return {**options, "patches": patches, "patches_replace": {**replaced, "attn1": attn1}}


class InjectedRows:
    """The rows of a call in groups that see the same sources, so that each group is one attention."""

    def __init__(self, sources: Sequence[Source], count: int) -> None:
        self.count = count  # of the call, with pictures that are rows of it
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in range(len(sources[0].rows)):
            seen = tuple(place for place, source in enumerate(sources) if source.rows[row])
            if seen:
                groups.setdefault(seen, []).append(row)
        self._groups = [([sources[place] for place in seen], rows) for seen, rows in groups.items()]
        self._selected: dict[tuple[int, torch.device], list[slice | Tensor]] = {}

    def selections(self, fold: int, device: torch.device) -> list[tuple[list[Source], slice | Tensor]]:
        """Sources and their rows, where every row of the call has become `fold` rows of an attention."""
        key = (fold, device)
        if key not in self._selected:
            self._selected[key] = [_selection(rows, fold, device) for _, rows in self._groups]
        return [(sources, rows) for (sources, _), rows in zip(self._groups, self._selected[key], strict=True)]


def _selection(rows: Sequence[int], fold: int, device: torch.device) -> slice | Tensor:
    """Neighbours are a slice, which copies nothing."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0] * fold, (rows[-1] + 1) * fold)
    return torch.tensor([row * fold + part for row in rows for part in range(fold)], device=device)


class InjectedAttention:
    def __init__(
        self,
        rows: InjectedRows,
        earlier: AttentionPatch | None,
        run: SamplingRun,
        joined: Sequence[BatchedReferences],
    ) -> None:
        self._rows = rows
        self._earlier = earlier
        self._run = run
        self._joined = joined

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        key = block_key(extra_options)
        if self._earlier is not None:
            # What it returns may be meant to be wrong, as guidance nodes do it: nothing is added to that.
            self._run.record_skip(REPLACED, key)
            return self._earlier(q, k, v, extra_options)
        if q.shape[0] != k.shape[0]:
            # Tiling nodes fold tiles of q into the batch and leave k and v whole; the kernels would reshape them so.
            k, v = (x.reshape(q.shape[0], -1, x.shape[-1]) for x in (k, v))
        for pictures in self._joined:
            pictures.record(key, k, v, extra_options)
        given = []
        fold, left = divmod(q.shape[0], self._rows.count)
        if left or extra_options.get("original_shape", [self._rows.count])[0] != self._rows.count:
            self._run.record_skip("another node changed the number of rows on the way there", key)
        else:
            given = [
                (rows, self._references(sources, key, q, extra_options))
                for sources, rows in self._rows.selections(fold, q.device)
            ]
        return attend_and_inject(q, k, v, given, extra_options["n_heads"], host_attention(extra_options))

    def _references(
        self, sources: Sequence[Source], key: BlockKey, q: Tensor, extra_options: dict[str, Any]
    ) -> list[Reference]:
        references = []
        for source in sources:
            if key not in source.bank:
                continue
            injection = source.injection
            query_mask = None
            if injection.attn_mask is not None:
                height, width = extra_options["activations_shape"][-2:]
                if height * width != q.shape[1]:
                    self._run.record_skip("tokens were merged or tiled there, so attn_mask cannot be placed", key)
                    continue
                query_mask = self._run.mask_weights(injection, height, width, q.device)
            references.append(Reference(source.bank[key], injection.strength, query_mask=query_mask))
        return references


def attend_and_inject(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Sequence[tuple[slice | Tensor, Sequence[Reference]]],
    heads: int,
    attend: Attention,
) -> Tensor:
    """One call for all rows as without us, and one more for the rows that are given references."""
    out = attend(q, k, v, heads)  # (b, n, heads*d)
    for rows, references in given:
        for reference in references:
            added = attend_to_reference(q[rows], reference, heads, attend)
            # In place: nothing is copied, and the weight costs nothing.
            if isinstance(rows, slice):
                out[rows].add_(added, alpha=reference.weight)
            else:
                out.index_add_(0, rows, added.to(out), alpha=reference.weight)
    return out
