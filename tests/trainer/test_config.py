"""Invalid settings are refused by name."""

import dataclasses

import pytest

from sa_inject.trainer.config import TrainConfig


def test_defaults_are_those_of_the_method():
    config = TrainConfig()
    assert (config.rank, config.alpha, config.reference_mode) == (16, 16.0, "clean")
    assert (config.lora_learning_rate, config.token_learning_rate) == (1e-3, 6e-3)


@pytest.mark.parametrize("name", ["steps", "batch_size", "gradient_accumulation", "rank"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be at least 1"):
        TrainConfig(**{name: value})
    TrainConfig(**{name: 1})


@pytest.mark.parametrize("name", ["lora_learning_rate", "token_learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_rate_that_is_negative_or_no_number_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be a number that is not negative"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["alpha", "max_gradient_norm"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_scale_that_is_not_above_zero_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be a number above 0"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_averaging_is_a_power_or_none(value):
    with pytest.raises(ValueError, match=f"average_power is {value}; it must be None or a number"):
        TrainConfig(average_power=value)
    assert TrainConfig(average_power=None).average_power is None


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_reference_dropout_is_a_share(value):
    with pytest.raises(ValueError, match=f"reference_dropout is {value}; it is a share"):
        TrainConfig(reference_dropout=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_reference_start_is_a_share_below_one(value):
    with pytest.raises(ValueError, match=f"reference_start is {value}; it is a share"):
        TrainConfig(reference_start=value)


def test_one_learning_rate_may_be_zero_but_not_both():
    TrainConfig(lora_learning_rate=0)
    TrainConfig(token_learning_rate=0)
    with pytest.raises(ValueError, match="Both learning rates are 0"):
        TrainConfig(lora_learning_rate=0, token_learning_rate=0)


def test_unknown_reference_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="reference_mode is 'noisy'; it is one of clean, noised"):
        TrainConfig(reference_mode="noisy")
    assert TrainConfig(reference_mode="noised").reference_mode == "noised"


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3
