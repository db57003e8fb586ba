"""Processes that share every batch: together they take the step that one would take alone."""

import threading

import pytest
import torch

from sa_inject.trainer.loop import Training
from tests.trainer.test_loop import GivenPairs, Pair, pictures, values, warmed_up
from tests.trainer.test_options import run
from tests.trainer.tiny_denoiser import example, fresh_subject


class Threads:
    """Workers that are threads of this process: `sum` waits until all have called it."""

    def __init__(self, rank: int, count: int, barrier: threading.Barrier, given: dict) -> None:
        self.rank, self.count = rank, count
        self._barrier, self._given = barrier, given

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self._given[self.rank] = tensor
        self._barrier.wait(60)
        total = torch.stack([self._given[rank] for rank in range(self.count)]).sum(dim=0)
        self._barrier.wait(60)
        return total

    def share(self, data: bytes | None) -> bytes | None:
        if self.rank == 0:
            self._given[-1] = data
        self._barrier.wait(60)
        return self._given[-1]


def together(count: int, data, steps: int, options: dict, **settings) -> list[tuple[list[float], dict]]:
    """Losses and values of each worker."""
    barrier, given, found = threading.Barrier(count), {}, {}
    subjects = [warmed_up(fresh_subject()) for _ in range(count)]  # not in threads: they seed torch's own generator
    runs: list[Training] = [run(subject, data, steps, options, **settings) for subject in subjects]

    def work(rank: int) -> None:
        runs[rank]._workers = Threads(rank, count, barrier, given)
        found[rank] = ([step.loss for step in runs[rank]], values(subjects[rank]))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(count)]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"batch_size": 4}),
        ({}, {"batch_size": 2, "gradient_accumulation": 2, "reference_mode": "noised", "reference_dropout": 0.5}),
        ({"prior_weight": 1.0, "caption_dropout": 0.5}, {"batch_size": 3}),
        ({}, {"batch_size": 1}),  # fewer pairs than workers
    ],
    ids=["batch", "accumulated", "options", "one pair"],
)
def test_workers_together_take_the_steps_of_one(count, options, settings):
    alone = warmed_up(fresh_subject())
    losses = [step.loss for step in run(alone, pictures(4), 4, options, **settings)]
    workers = together(count, pictures(4), 4, options, **settings)
    for found, learned in workers:
        assert found == pytest.approx(losses, rel=1e-4)
        for name, tensor in values(alone).items():
            assert torch.equal(learned[name], workers[0][1][name]), name  # no worker drifts away from another
            # Sums in another order differ in the last bits, which Adam divides by the gradient's own size.
            assert (learned[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def test_step_without_any_gradient_stays_one():
    data = GivenPairs([Pair(example(0), "sks", None)])
    settings = {"batch_size": 2, "token_learning_rate": 0.0}
    alone = warmed_up(fresh_subject())
    losses = [step.loss for step in run(alone, data, 2, {}, **settings)]
    for found, learned in together(2, data, 2, {}, **settings):
        assert found == pytest.approx(losses, rel=1e-5)
        assert all(torch.equal(learned[name], tensor) for name, tensor in values(alone).items())
