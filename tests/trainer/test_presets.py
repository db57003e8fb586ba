"""Presets and settings: what they replace, and what they refuse."""

import dataclasses

import pytest

from sa_inject.trainer.config import TrainConfig
from sa_inject.trainer.presets import AS_SET, PRESETS, with_preset
from sa_inject.trainer.settings import TrainingSettings, prompt_lines

INPUTS = {"steps": 7, "rank": 2, "alpha": 2.0, "reference_mode": "noised", "seed": 5}


def test_as_set_leaves_every_input():
    assert with_preset(INPUTS, AS_SET) == INPUTS and next(iter(PRESETS)) == AS_SET


@pytest.mark.parametrize("name", [name for name in PRESETS if name != AS_SET])
def test_a_preset_replaces_what_it_names_and_nothing_else(name):
    chosen = with_preset(INPUTS, name)
    assert chosen == {**INPUTS, **PRESETS[name]} and chosen["seed"] == 5
    assert PRESETS[name].keys() <= {field.name for field in dataclasses.fields(TrainConfig)}
    TrainConfig(**PRESETS[name])


def test_presets_take_more_steps_from_quick_to_thorough():
    steps = [PRESETS[name]["steps"] for name in ("quick", "balanced", "thorough")]
    assert steps == sorted(set(steps))


def test_a_preset_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="preset is 'fast'; it is one of as set, quick"):
        with_preset(INPUTS, "fast")


def test_prompts_are_lines():
    assert prompt_lines("  a toy \n\n a toy, at night\r\n") == ("a toy", "a toy, at night")
    assert prompt_lines(" \n ") == ()


@pytest.mark.parametrize("name", ["sample_every", "kept", "validation_every", "save_every"])
def test_settings_refuse_what_no_number_of_steps_is(name):
    with pytest.raises(ValueError, match=f"{name} is -2; it must be at least"):
        TrainingSettings(**{name: -2})
