"""Long training leaves busy cores to other programs."""

import os
import time

import pytest
import torch

from sa_inject.demo.base import threads

CORES = 4

pytestmark = pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the system does not count its ticks")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(seconds, user, nice, system)`: so long later, the cores have spent that much in between."""
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    stat, now, spent = tmp_path / "stat", [0.0], [0.0, 0.0, 0.0]

    def advance(seconds: float, user: float = 0.0, nice: float = 0.0, system: float = 0.0) -> None:
        now[0] += seconds
        spent[:] = [before + more for before, more in zip(spent, (user, nice, system), strict=True)]
        stat.write_text("cpu  " + " ".join(str(round(s * ticks_per_second)) for s in spent) + " 0 0 0\ncpu0 1 1 1\n")

    advance(0)
    monkeypatch.setattr(threads, "STAT", stat)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "cpu_count", lambda: CORES)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return advance


@pytest.mark.parametrize(
    ("spent", "left"),
    [
        ({}, 4),
        ({"nice": 40}, 4),
        ({"user": 10}, 3),
        ({"user": 5, "system": 5}, 3),
        ({"user": 30}, 1),
        ({"user": 40}, 1),
    ],
    ids=str,
)
def test_each_core_that_others_keep_busy_takes_a_thread_but_never_the_last(machine, spent, left):
    cores = threads.FreeCores()
    machine(10, **spent)
    cores.adjust()
    assert torch.get_num_threads() == left


def test_threads_come_back_when_the_other_program_is_done(machine):
    cores = threads.FreeCores()
    for spent, left in ((20, 2), (0, 4)):
        machine(10, user=spent)
        cores.adjust()
        assert torch.get_num_threads() == left


def test_between_two_looks_nothing_changes(machine):
    cores = threads.FreeCores(interval=2.0)
    machine(1, user=4)
    cores.adjust()
    assert torch.get_num_threads() == CORES


def test_never_more_threads_than_the_environment_allows(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cores = threads.FreeCores()
    machine(10)
    cores.adjust()
    assert torch.get_num_threads() == 2
