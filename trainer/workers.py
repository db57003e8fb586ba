"""Several processes that take each step together: each computes some rows of the batch, and their gradients add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Workers(Protocol):
    """The processes of one training, seen from one of them."""

    rank: int  # of this process, from 0
    count: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of what all processes give, the same in each. Every process must call it."""
        ...


class Alone:
    """One process, which computes everything."""

    rank = 0
    count = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def sum_gradients(parameters: Sequence[nn.Parameter], loss: float, workers: Workers) -> float:
    """Let every process hold the gradients of all, and return the loss of all.

    A parameter that has a gradient in no process keeps none.
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
