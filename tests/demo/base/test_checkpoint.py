"""The host loads the checkpoint as Stable Diffusion 1.5, with shipped weights or without."""

import logging

import pytest
import torch
from safetensors import safe_open

pytestmark = pytest.mark.comfy

UNET, AUTOENCODER, TEXT_ENCODER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import checkpoint

    return checkpoint


def tensors_below(path, prefix: str) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}


def test_the_host_takes_it_for_stable_diffusion_1_5(loaded):
    model = loaded.model.model
    found = (type(model.model_config).__name__, type(model).__name__, model.model_type.name)
    assert found == ("SD15", "BaseModel", "EPS")
    assert type(model.latent_format).__name__ == "SD15"
    assert type(loaded.clip.cond_stage_model).__name__ == "SD1ClipModel"
    assert type(loaded.vae.first_stage_model).__name__ == "TAESD"


def test_every_weight_that_the_host_has_comes_from_the_file(random_checkpoint, loaded):
    """And none stays over. The host's `text_projection` and the schedule of sigmas are in no such checkpoint."""
    parts = {
        UNET: loaded.model.model.diffusion_model,
        AUTOENCODER: loaded.vae.first_stage_model,
        TEXT_ENCODER: loaded.clip.cond_stage_model.clip_l.transformer,
    }
    for prefix, part in parts.items():
        written, held = tensors_below(random_checkpoint, prefix), part.state_dict()
        written.pop("text_model.embeddings.position_ids", None)
        held.pop("text_projection.weight", None)
        assert written.keys() == held.keys()
        different = [
            name for name, value in held.items() if not torch.equal(value.cpu().float(), written[name].float())
        ]
        assert different == []
    with safe_open(random_checkpoint, "pt") as file:
        assert [name for name in file.keys() if not name.startswith(tuple(parts))] == []


@torch.inference_mode()
def test_the_host_draws_with_it(loaded):
    """Nothing to look at, but finite in float16, and different words give different pictures."""
    import comfy.sample

    def words(text: str) -> list:
        return loaded.clip.encode_from_tokens_scheduled(loaded.clip.tokenize(text))

    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed=0)
    prompts = ("a small cat on the left, red background", "a large dog on the right, blue background")
    drawn = [
        comfy.sample.sample(loaded.model, noise, 2, 3.0, "euler", "normal", words(text), words(""), latent)
        for text in prompts
    ]
    pictures = [loaded.vae.decode(samples) for samples in drawn]
    assert all(picture.shape == (1, 64, 64, 3) and picture.isfinite().all() for picture in pictures)
    assert not torch.allclose(*drawn)


def test_a_random_checkpoint_says_so(random_checkpoint):
    with safe_open(random_checkpoint, "pt") as file:
        assert file.metadata()["weights"] == "random, seed 0"
    assert [path.name for path in random_checkpoint.parent.iterdir()] == [random_checkpoint.name]


def test_without_weights_it_warns_that_what_it_writes_draws_nothing(module, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "write_random_checkpoint", lambda path: path.touch())
    module.write_checkpoint(tmp_path / "demo.safetensors", weights=tmp_path / "weights.safetensors")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "draw nothing" in record.getMessage()


def test_shipped_weights_and_the_drawn_text_encoder_are_all_that_is_in_it(module, text_encoder_weights, tmp_path):
    from sa_inject.demo.base.weights import write_weights

    unet, autoencoder = {"out.2.bias": torch.arange(4.0)}, {"vae_scale": torch.tensor(0.18215)}
    weights = write_weights(unet, autoencoder, tmp_path / "weights.safetensors")
    path = tmp_path / "demo.safetensors"
    module.write_checkpoint(path, weights)
    assert torch.equal(tensors_below(path, UNET).pop("out.2.bias"), torch.arange(4.0).half())
    assert tensors_below(path, AUTOENCODER).keys() == {"vae_scale"}
    assert tensors_below(path, TEXT_ENCODER + "text_model.").keys() == text_encoder_weights.keys()
    with safe_open(path, "pt") as file:
        assert file.metadata()["weights"] == "weights.safetensors"
    path.unlink()


def test_damaged_weights_leave_no_checkpoint_behind(module, tmp_path):
    from sa_inject.demo.base.weights import write_weights

    weights = write_weights({"out.2.bias": torch.zeros(4)}, {}, tmp_path / "weights.safetensors")
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        module.write_checkpoint(tmp_path / "checkpoints" / "demo.safetensors", weights)
    assert not (tmp_path / "checkpoints").exists()


def test_the_weights_that_are_shipped_fill_the_unet_and_the_autoencoder(module):
    shipped = module.read_weights()
    wanted = {UNET + name: value.shape for name, value in module.new_unet(0).state_dict().items()}
    wanted |= {AUTOENCODER + name: value.shape for name, value in module.new_autoencoder(0).state_dict().items()}
    assert {name: value.shape for name, value in shipped.items()} == wanted
    assert [name for name, value in shipped.items() if not value.isfinite().all()] == []
