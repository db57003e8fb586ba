"""The node SA-Inject Training Settings, and which inputs of the training node are for those who ask for more."""

import dataclasses

import pytest

FACE = {
    "model",
    "clip",
    "vae",
    "images",
    "captions",
    "masks",
    "placeholder_token",
    "class_word",
    "resolution",
    "steps",
    "file_name",
    "sample_every",
    "preset",
    "settings",
    "adapter",
}


def test_the_settings_node_hands_over_its_inputs(comfy_host, pack_nodes):
    from sa_inject.trainer.settings import TrainingSettings

    (as_it_comes,) = comfy_host.execute("SAInjectTrainingSettings")
    assert as_it_comes == TrainingSettings()
    (settings,) = comfy_host.execute("SAInjectTrainingSettings", sample_prompts="a toy\n\nsainj toy", kept=2)
    assert settings == TrainingSettings(sample_prompts=("a toy", "sainj toy"), kept=2)


def test_every_setting_is_an_input_of_the_node(pack_nodes):
    from sa_inject.trainer.options import TrainOptions
    from sa_inject.trainer.settings import TrainingSettings

    inputs = pack_nodes["SAInjectTrainingSettings"].INPUT_TYPES()
    names = {*inputs["required"], *inputs.get("optional", {})}
    settings = {field.name for kind in (TrainingSettings, TrainOptions) for field in dataclasses.fields(kind)}
    assert names == settings - {"options"}


def test_every_input_of_the_node_begins_at_the_default_of_its_setting(comfy_host, pack_nodes):
    """So that the node, connected as it comes, changes nothing: not even which training it is."""
    from sa_inject.trainer.config import TrainConfig
    from sa_inject.trainer.settings import TrainingSettings

    (as_it_comes,) = comfy_host.execute("SAInjectTrainingSettings")
    assert TrainConfig(**as_it_comes.for_config()) == TrainConfig(**TrainingSettings().for_config()) == TrainConfig()


def test_the_training_node_shows_a_face_and_keeps_the_rest_behind_it(client):
    info = client.object_info("TrainSAInjectAdapter")["input"]
    inputs = {**info["required"], **info["optional"]}
    advanced = {name for name, spec in inputs.items() if len(spec) > 1 and spec[1].get("advanced")}
    assert inputs.keys() - advanced == FACE
    assert list(info["optional"])[-4:] == ["sample_every", "preset", "settings", "adapter"]


@pytest.mark.parametrize("preset, steps", [("as set", 1), ("quick", 2)])
def test_a_preset_replaces_inputs(comfy_host, pack_nodes, load_checkpoint, monkeypatch, preset, steps):
    import torch

    from sa_inject.trainer import presets

    monkeypatch.setattr(presets, "PRESETS", {"as set": {}, "quick": {"steps": 2, "rank": 4}})
    model, clip, vae = load_checkpoint("sd15")
    given = {"model": model, "clip": clip, "vae": vae, "images": torch.rand(2, 64, 64, 3), "preset": preset}
    small = {"resolution": 64, "steps": 1, "rank": 2, "previews": 0, "sample_every": 0, "file_name": "preset"}
    adapter, _, losses, *_ = comfy_host.execute("TrainSAInjectAdapter", **given, **small)
    assert len(losses["loss"]) == steps and adapter.info.rank == 2 * steps


@pytest.mark.parametrize(
    "preset, rank, mode", [("quick", 8, "clean"), ("balanced", 16, "clean"), ("thorough", 16, "noised")]
)
def test_each_preset_trains(comfy_host, pack_nodes, load_checkpoint, monkeypatch, preset, rank, mode):
    """With two steps in the place of its own number; `bench/presets` takes all of them."""
    import torch

    from sa_inject.trainer import presets

    few = {name: {**inputs, "steps": 2} for name, inputs in presets.PRESETS.items()}
    assert few.keys() == {"as set", "quick", "balanced", "thorough"}
    monkeypatch.setattr(presets, "PRESETS", few)
    model, clip, vae = load_checkpoint("sd15")
    given = {"model": model, "clip": clip, "vae": vae, "images": torch.rand(2, 64, 64, 3), "preset": preset}
    small = {"resolution": 64, "previews": 0, "sample_every": 0, "file_name": "preset"}
    adapter, _, losses, *_ = comfy_host.execute("TrainSAInjectAdapter", **given, **small)
    assert len(losses["loss"]) == 2 and all(loss > 0 for loss in losses["loss"])
    assert (adapter.info.rank, adapter.info.alpha, adapter.info.reference_mode) == (rank, rank, mode)
