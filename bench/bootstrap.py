"""Confidence intervals of means over subjects."""

from __future__ import annotations

from collections.abc import Sequence

import torch

RESAMPLES = 10_000


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of the mean, by the percentile bootstrap. A single value has none."""
    if len(values) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
