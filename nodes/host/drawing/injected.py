"""The self-attention with injection, for one call of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.injection import Reference, inject
from ....core.kv import KVBank
from ....core.lora import LoRADeltas
from ....core.site import Site
from .batched_reference import BatchedReferences
from .sampling_run import Injection, SamplingRun

REPLACED = "another node replaces the self-attention there"


@dataclass(frozen=True, eq=False)
class Source:
    injection: Injection
    rows: Sequence[bool]  # for each row of the call, whether the injection applies to it
    bank: KVBank
    deltas: LoRADeltas | None = None  # if the bank holds values at the LoRA's rank


class InjectedCall:
    """Computes the self-attentions of one call, and adds the attention to the references."""

    def __init__(self, sources: Sequence[Source], run: SamplingRun, batched: Sequence[BatchedReferences]) -> None:
        self._sources = sources
        self._run = run
        self._batched = batched
        # All rows of the call, with those of batched references.
        self._rows = len(sources[0].rows) + sum(len(pictures.prompt.pictures) for pictures in batched)
        # Blocks whose keys and values are in a bank, or will be during the call.
        self.blocks = {s for source in sources for s in source.injection.blocks if s in source.bank or batched}
        self._selected: dict[tuple[int, torch.device], list[tuple[Source, slice | Tensor]]] = {}

    def at(self, site: Site) -> Tensor:
        for pictures in self._batched:
            pictures.record(site)
        return inject(site, self._references(site))

    def _references(self, site: Site) -> list[Reference]:
        fold, left = divmod(site.q.shape[0], self._rows)
        if left or site.rows not in (None, self._rows):
            self._run.record_skip("another node changed the number of rows on the way there", site.key)
            return []
        references = []
        for source, rows in self._select_rows(fold, site.q.device):
            if site.key not in source.bank:
                continue
            query_mask = None
            if source.injection.attn_mask is not None:
                if not site.has_whole_grid:
                    self._run.record_skip("tokens were merged or tiled there, so attn_mask cannot be placed", site.key)
                    continue
                query_mask = self._run.mask_weights(source.injection, site.height, site.width, site.q.device)
            references.append(
                Reference(
                    source.bank[site.key],
                    source.injection.strength,
                    query_mask=query_mask,
                    rows=rows,
                    positions=source.injection.adapter.info.positions,
                    widen=None if source.deltas is None else source.deltas[site.key, "to_v"].widen,
                )
            )
        return references

    def _select_rows(self, fold: int, device: torch.device) -> list[tuple[Source, slice | Tensor]]:
        """Sources and their rows in an attention in which each row of the call is `fold` rows, as with tiling nodes."""
        key = (fold, device)
        if key not in self._selected:
            self._selected[key] = []
            for source in self._sources:
                rows = [row * fold + part for row, sees in enumerate(source.rows) if sees for part in range(fold)]
                is_slice = rows[-1] - rows[0] + 1 == len(rows)  # a slice copies nothing
                chosen = slice(rows[0], rows[-1] + 1) if is_slice else torch.tensor(rows, device=device)
                self._selected[key].append((source, chosen))
        return self._selected[key]
