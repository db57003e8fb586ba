"""Optimizers and schedules: those of torch, and Prodigy where it is installed."""

import itertools
import math
import sys

import pytest
import torch

from sa_inject.trainer.config import TrainConfig
from sa_inject.trainer.optimizers import available_optimizers, build_optimizer, check_optimizer, learning_rate_factor
from tests.trainer.test_loop import held_out_loss, pictures, values
from tests.trainer.test_options import run, same
from tests.trainer.tiny_denoiser import fresh_subject

HAS_PRODIGY = "prodigy" in available_optimizers()
needs_prodigy = pytest.mark.skipif(not HAS_PRODIGY, reason="prodigyopt is not installed")


# --- Schedules


def factors(steps: int, schedule: str, warmup: int) -> list[float]:
    return [learning_rate_factor(done, steps, schedule, warmup) for done in range(steps)]


def test_constant_stays_and_warm_up_rises_to_it():
    assert factors(5, "constant", 0) == [1.0] * 5
    assert factors(6, "constant", 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(2, "constant", 4) == [0.25, 0.5]  # longer than the run


def test_linear_and_cosine_fall_towards_zero_and_never_reach_it():
    assert factors(4, "linear", 0) == [1.0, 0.75, 0.5, 0.25]
    assert factors(6, "linear", 2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(4, "cosine", 0) == pytest.approx([0.5 * (1 + math.cos(math.pi * at / 4)) for at in range(4)])
    assert factors(1, "cosine", 1) == factors(1, "linear", 1) == [1.0]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_learning_rates_of_both_groups_follow_the_schedule(schedule):
    options = {"schedule": schedule, "warmup_steps": 2}
    training = run(fresh_subject(), pictures(), 6, options, lora_learning_rate=1e-2, token_learning_rate=2e-3)
    rates = [training.learning_rates]
    rates += [training.learning_rates for _ in training]
    expected = factors(6, schedule, 2)
    assert [lora for lora, _ in rates[:-1]] == pytest.approx([1e-2 * factor for factor in expected])
    assert [word for _, word in rates[:-1]] == pytest.approx([2e-3 * factor for factor in expected])


def test_warm_up_makes_the_first_step_smaller():
    sizes = []
    for warmup in (0, 10):
        subject = fresh_subject()
        before = values(subject)
        next(run(subject, pictures(), 20, {"warmup_steps": warmup}, weight_decay=0.0))
        sizes.append((values(subject)["token"] - before["token"]).norm().item())
    assert sizes[1] == pytest.approx(sizes[0] / 10, rel=1e-3)


# --- Prodigy


def test_optimizer_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # as Python has it for what cannot be imported
    assert available_optimizers() == ["adamw"]
    with pytest.raises(ValueError, match=r"'prodigy' is not installed. Run 'pip install prodigyopt'"):
        check_optimizer("prodigy")
    subject = fresh_subject()
    with pytest.raises(ValueError, match="pip install prodigyopt"):
        run(subject, pictures(), options={"optimizer": "prodigy"})


def test_adamw_is_the_default_and_always_there():
    check_optimizer("adamw")
    subject = fresh_subject()
    optimizer = build_optimizer(TrainConfig(), subject.lora.parameters(), subject.tokens)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


@needs_prodigy
def test_prodigy_finds_a_rate_and_learns_with_it():
    subject, data = fresh_subject(rank=4), pictures(2)
    before = held_out_loss(subject, data)
    training = run(subject, data, 60, {"optimizer": "prodigy"}, batch_size=4, average_power=4.0)
    rates = [training.learning_rates for _ in training]
    training.apply_average()
    assert all(lora == word for lora, word in rates)  # one for both
    assert rates[-1][0] > 100 * rates[0][0]
    assert held_out_loss(subject, data) < 0.995 * before


@needs_prodigy
def test_prodigy_asks_for_no_rate_but_keeps_still_what_has_none():
    ends = []
    for rates in ((1e-2, 1e-2), (3e-5, 7e-1)):
        subject = fresh_subject()
        settings = dict(zip(("lora_learning_rate", "token_learning_rate"), rates, strict=True))
        list(run(subject, pictures(), 4, {"optimizer": "prodigy"}, **settings))
        ends.append(values(subject))
    assert same(*ends)
    for still, rates in (("lora", (0.0, 1.0)), ("token", (1.0, 0.0))):
        subject = fresh_subject()
        before = values(subject)
        settings = dict(zip(("lora_learning_rate", "token_learning_rate"), rates, strict=True))
        list(run(subject, pictures(), 4, {"optimizer": "prodigy"}, weight_decay=0.5, **settings))
        for name, tensor in values(subject).items():
            if (name == "token") == (still == "token"):
                assert torch.equal(tensor, before[name]), name
        assert not same(values(subject), before)


@needs_prodigy
@pytest.mark.parametrize("options", [{}, {"schedule": "cosine", "warmup_steps": 2, "token_freeze_after": 0.5}])
def test_prodigy_goes_on_from_a_file_as_if_it_had_never_stopped(tmp_path, options):
    options = {"optimizer": "prodigy", **options}
    whole = fresh_subject()
    list(run(whole, pictures(), 8, options))
    stopped = fresh_subject()
    training = run(stopped, pictures(), 8, options)
    list(itertools.islice(training, 5))
    torch.save(training.state_dict(), tmp_path / "state")
    resumed = fresh_subject()
    training = run(resumed, pictures(), 8, options)
    training.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    list(training)
    assert same(values(resumed), values(whole))
