"""The autoencoder's latents are the ones that the host's UNet sees, and an interrupted training is not lost."""

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import autoencoder

    return autoencoder


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.RandomState(0)
    small = [Image.fromarray(rng.randint(0, 256, (4, 4, 3)).astype(np.uint8)) for _ in range(2)]
    return [image.resize((64, 64), Image.Resampling.BICUBIC) for image in small]


def test_pictures_become_tensors_from_0_to_1_with_rows_where_rows_were(module):
    image = Image.new("RGB", (3, 2), (0, 51, 255))
    image.putpixel((2, 0), (255, 0, 0))
    tensor = module.to_tensor([image])
    assert tensor.shape == (1, 3, 2, 3)
    assert torch.allclose(tensor[0, :, 1, 2], torch.tensor([0.0, 0.2, 1.0]))
    assert torch.allclose(tensor[0, :, 0, 2], torch.tensor([1.0, 0.0, 0.0]))


def test_a_fresh_autoencoder_follows_from_its_seed_and_has_latents_of_useful_size(module, pictures):
    first, again, other = (module.new_autoencoder(seed) for seed in (3, 3, 4))
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())
    assert 0.1 < module.encode(first, pictures).std() < 10


def test_a_picture_has_an_eighth_of_its_sides_in_latents_and_gets_them_back(module, autoencoder_file, pictures):
    model = module.load_autoencoder(autoencoder_file)
    latent = module.encode(model, pictures)
    assert latent.shape == (2, 4, 8, 8) and latent.dtype == torch.float32
    assert [(image.mode, image.size) for image in module.decode(model, latent)] == [("RGB", (64, 64))] * 2


def test_what_is_loaded_is_what_was_saved_and_takes_no_gradients(module, autoencoder_file):
    model = module.load_autoencoder(autoencoder_file)
    saved = torch.load(autoencoder_file, weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@torch.inference_mode()
def test_the_hosts_unet_sees_the_latents_that_ours_is_trained_on(module, loaded, pictures):
    """Through the host's VAE and SD1.5's own scaling, with the same weights."""
    ours = module.encode(module.new_autoencoder(seed=0), pictures)
    pixels = module.to_tensor(pictures).permute(0, 2, 3, 1)  # (b, h, w, 3), the host's order
    by_host = loaded.model.model.process_latent_in(loaded.vae.encode(pixels))
    assert (ours - by_host).norm() < 0.03 * by_host.norm()


@torch.inference_mode()
def test_the_host_decodes_to_the_pictures_that_we_decode_to(module, loaded, pictures):
    model = module.new_autoencoder(seed=0)
    latent = module.encode(model, pictures)
    ours = module.to_tensor(module.decode(model, latent)).permute(0, 2, 3, 1)
    by_host = loaded.vae.decode(loaded.model.model.process_latent_out(latent))
    assert (ours - by_host).abs().mean() < 0.01 and by_host.std() > 0.05


@pytest.fixture
def training(monkeypatch):
    from sa_inject.demo.base import autoencoder_training

    monkeypatch.setattr(autoencoder_training, "CROP", 32)
    monkeypatch.setattr(autoencoder_training, "BATCH", 2)
    monkeypatch.setattr(autoencoder_training, "LEARNING_RATE", 1e-2)
    return autoencoder_training


def reconstruction_error(module, path, pictures) -> float:
    model = module.load_autoencoder(path)
    decoded = module.to_tensor(module.decode(model, module.encode(model, pictures)))
    return (decoded - module.to_tensor(pictures)).abs().mean().item()


@pytest.mark.usefixtures("artwork")
def test_training_brings_decoded_pictures_closer_to_the_encoded_ones(module, training, pictures, tmp_path):
    torch.save(module.new_autoencoder(seed=1).state_dict(), tmp_path / "fresh.pt")
    training.train_autoencoder(tmp_path / "trained.pt", steps=4, seed=1, device="cpu")
    before, after = (reconstruction_error(module, tmp_path / name, pictures) for name in ("fresh.pt", "trained.pt"))
    assert after < 0.8 * before


@pytest.mark.usefixtures("artwork")
def test_an_interrupted_training_goes_on_from_what_it_had(module, training, tmp_path):
    """One step moves weights a little: the result lies by those that were there, not by those of the seed."""
    interrupted = module.new_autoencoder(seed=5).state_dict()
    torch.save({"step": 3, "weights": interrupted}, tmp_path / "autoencoder.part")
    training.train_autoencoder(tmp_path / "autoencoder.pt", steps=4, seed=1, device="cpu")
    trained = module.load_autoencoder(tmp_path / "autoencoder.pt").state_dict()
    changes = {name: (trained[name] - value).norm() for name, value in interrupted.items() if value.ndim > 1}
    assert all(0 < change < 0.05 * interrupted[name].norm() for name, change in changes.items())
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder.pt"]


@pytest.mark.usefixtures("artwork")
def test_training_the_decoder_sharpens_pictures_and_leaves_every_latent_as_it_was(module, training, pictures, tmp_path):
    path = tmp_path / "autoencoder.pt"
    torch.save(module.new_autoencoder(seed=1).state_dict(), path)
    latents = module.encode(module.load_autoencoder(path), pictures)
    error = reconstruction_error(module, path, pictures)
    training.train_decoder(path, steps=4, seed=1, device="cpu")
    assert torch.equal(module.encode(module.load_autoencoder(path), pictures), latents)
    assert reconstruction_error(module, path, pictures) < 0.9 * error


def test_edges_count_where_colours_agree(training):
    """A picture that is too bright everywhere has the same differences; one that is blurred has others."""
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 1
    blurred = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2, count_include_pad=False)
    assert training.gradient_difference(pixels + 0.2, pixels).item() == pytest.approx(0, abs=1e-6)
    assert training.gradient_difference(blurred, pixels).item() > 0.01


@pytest.mark.usefixtures("artwork")
def test_a_discriminator_learns_beside_the_autoencoder_and_is_kept_with_it(module, training, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ADVERSARIAL_FROM", 0)
    plan = training.Plan(steps=4, seed=1, adversarial=True)
    run = training.Training(module.new_autoencoder(1), tmp_path / "autoencoder.part", plan)
    before = {name: value.clone() for name, value in run.discriminator.state_dict().items() if "original" in name}
    pixels = training.Crops(plan.world, plan.seed, 2, 32)[1].float() / 255
    figures = [run.learn(pixels, factor=1.0) for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in figures)
    learned = run.discriminator.state_dict()
    assert all(not torch.equal(learned[name], value) for name, value in before.items())
    run.save()
    again = training.Training(module.new_autoencoder(2), tmp_path / "autoencoder.part", plan)
    assert again.step == 2
    assert all(torch.equal(value, learned[name]) for name, value in again.discriminator.state_dict().items())
    assert again.averaged().keys() == run.averaged().keys()
    assert all(torch.equal(value, run.averaged()[name]) for name, value in again.averaged().items())


@pytest.mark.usefixtures("artwork")
def test_a_run_of_some_minutes_stops_and_the_same_command_ends_it(module, training, tmp_path):
    path, partial = tmp_path / "autoencoder.pt", tmp_path / "autoencoder.part"
    plan = training.Plan(steps=3, seed=1)
    training.train(module.new_autoencoder(1), path, partial, plan._replace(minutes=0.0))
    assert not path.exists() and torch.load(partial, weights_only=True)["step"] == 1
    training.train(module.new_autoencoder(2), path, partial, plan)
    assert path.exists() and not partial.exists()
