"""Data-parallel training: each process computes some rows of a batch, and the gradients are summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Workers(Protocol):
    """The processes of one training, as seen by one of them."""

    rank: int  # of this process, from 0
    count: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes. Every process must call it."""
        ...


class Alone:
    """A single process."""

    rank = 0
    count = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def sum_gradients(parameters: Sequence[nn.Parameter], loss: float, workers: Workers) -> float:
    """Sum gradients over all processes, and return the summed loss.

    A parameter without a gradient in any process keeps none.
    """
    if workers.count == 1:
        return loss
    device = parameters[0].device
    flags = [loss, *(float(parameter.grad is not None) for parameter in parameters)]
    parts = [torch.tensor(flags, device=device)]
    parts += [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    total, *sums = workers.sum(torch.cat(parts)).split([len(part) for part in parts])
    for parameter, gradient, found in zip(parameters, sums, total[1:].tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter).clone() if found else None
    return total[0].item()
