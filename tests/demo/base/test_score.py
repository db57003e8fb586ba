"""What is scored is what a run has averaged, or what was exported of it, on captions that tell the truth."""

import functools

import pytest
import torch

from sa_inject.demo.base.artwork import objects

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import score

    return score


def test_captions_are_of_base_objects_and_say_what_their_scenes_are(module):
    scenes, captions = module.random_captions(200)
    assert (scenes, captions) == module.random_captions(200)
    assert {scene.artwork for scene in scenes} <= set(objects("base"))
    for scene, caption in zip(scenes, captions, strict=True):
        said = {scene.artwork.word, scene.size, scene.side, scene.colour, scene.pattern} - {"plain"}
        assert all(word in caption for word in said)


def test_captions_come_in_every_wording(module):
    _, captions = module.random_captions(200)
    assert {caption.split()[0] for caption in captions} >= {"a", "on", "small", "large"}
    assert any(" side, " in caption for caption in captions) and any("picture of" in caption for caption in captions)


def test_a_training_runs_folder_and_what_is_exported_from_it_are_the_same_model(
    module, autoencoder_file, tmp_path, monkeypatch
):
    """The average, that is, not the UNet that is being trained."""
    from sa_inject.demo.base import weights

    unet, average = (module.new_unet(seed, closed_std=1.0).state_dict() for seed in (1, 2))
    torch.save({"unet": {"out.2.bias": unet["out.2.bias"]}, "average": average}, tmp_path / "unet.pt")
    (tmp_path / "autoencoder.pt").write_bytes(autoencoder_file.read_bytes())
    autoencoder = torch.load(autoencoder_file, weights_only=True)
    path = weights.write_weights(average, autoencoder, tmp_path / "weights.safetensors")
    monkeypatch.setattr(module, "read_parts", functools.partial(weights.read_parts, path))

    for state in (tmp_path, None):
        for part, expected in zip(module.load(state, "cpu"), (average, autoencoder), strict=True):
            found = part.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.allclose(found[name], value, rtol=1e-3, atol=1e-4) for name, value in expected.items())
    (tmp_path / "unet.pt").unlink()
    path.unlink()
