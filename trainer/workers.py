"""Data-parallel training: each process computes some rows of a batch, and the gradients are summed."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .loop import Training


class Workers(Protocol):
    """The processes of one training, as one of them sees them."""

    rank: int  # index of this process, from 0
    count: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes. Must be called in all processes."""
        ...

    def share(self, data: bytes | None) -> bytes | None:
        """The value of the first process, in every process. Must be called in all processes."""
        ...


class Alone:
    """A single process."""

    rank = 0
    count = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def share(self, data: bytes | None) -> bytes | None:
        return data


class FollowerDoneError(RuntimeError):
    """Raised at the end of a training in every process but the first, which saves the adapter."""


_workers: ContextVar[Workers] = ContextVar("workers")


def current_workers() -> Workers:
    """The processes that share the training that is prepared here."""
    return _workers.get(Alone())


@contextlib.contextmanager
def working_with(workers: Workers) -> Generator[None]:
    token = _workers.set(workers)
    try:
        yield
    finally:
        _workers.reset(token)


def share_state(training: Training, workers: Workers) -> None:
    """Give the state of the first process to all others."""
    if workers.count == 1:
        return
    buffer = io.BytesIO()
    if workers.rank == 0:
        torch.save(training.state_dict(), buffer)
    data = workers.share(buffer.getvalue())
    if workers.rank > 0 and data is not None:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        training.load_state_dict(state)


def share_number(number: int | None, workers: Workers) -> int:
    """The first process's number, in every process. Must be called in all processes."""
    data = workers.share(None if number is None else str(number).encode())
    assert data is not None
    return int(data)


def follow(training: Training, workers: Workers) -> NoReturn:
    """Take all steps in a further process. Only the first process saves and shows anything."""
    share_state(training, workers)
    for _ in itertools.islice(training, share_number(None, workers) - len(training.losses)):
        pass
    raise FollowerDoneError


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
    total, *sums = torch.split(workers.sum(torch.cat(parts)), [len(part) for part in parts])
    for parameter, gradient, found in zip(parameters, sums, map(float, total[1:]), strict=True):
        parameter.grad = gradient.view_as(parameter).clone() if found else None
    return total[0].item()
