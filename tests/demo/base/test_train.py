"""Training learns, goes on after a pause as if there had been none, and exports what it has averaged.

Everything here runs uncompiled: compiling takes a minute, and computes the same. The UNet is narrow: on a CPU without
bfloat16, Muon takes half a minute for a step of the wide one.
"""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")]  # PyTorch's own

BATCH = 2


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import train, unet

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(unet.CONFIG, "model_channels", 64)
        yield train


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    import torch._dynamo

    with torch._dynamo.config.patch(suppress_errors=False), torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def new_training(module, uncompiled, caption_encoder, tmp_path_factory) -> Callable[[], Any]:
    """All in one folder, and with the one caption encoder that the tests share: it never learns."""
    folder = tmp_path_factory.mktemp("training")

    def new() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CaptionEncoder", lambda device: caption_encoder)
            return module.Training(folder, "cpu")

    return new


@pytest.fixture(scope="module")
def start(module) -> dict[str, Tensor]:
    return module.new_unet(module.SEED).state_dict()


@pytest.fixture(scope="module")
def runs(pool, new_training) -> Iterator[SimpleNamespace]:
    """Four steps without a pause, and the same four with one half way.

    Not sooner: the first step's gradient reaches the last layer alone, so that Muon has nothing to remember of it.
    """

    def learn(training, steps: int) -> list[float]:
        return [training.learn(pool, BATCH, factor=0.5) for _ in range(steps)]

    unpaused = new_training()
    losses = learn(unpaused, 2)
    unpaused.save()
    losses += learn(unpaused, 2)

    resumed = new_training()
    resumed.load()
    steps_before = resumed.step
    losses_after = learn(resumed, 2)
    yield SimpleNamespace(
        folder=resumed.folder,
        unpaused=unpaused,
        losses=losses,
        resumed=resumed,
        steps_before=steps_before,
        losses_after=losses_after,
    )
    resumed.checkpoint.unlink()  # 300 MB


def test_a_resumed_training_has_the_losses_of_one_without_a_pause(runs):
    assert runs.steps_before == 2
    assert runs.losses_after == pytest.approx(runs.losses[2:], rel=1e-4)
    assert len({round(loss, 3) for loss in runs.losses}) == 4  # each step has its own, so agreeing means something


def test_a_resumed_training_ends_with_the_weights_of_one_without_a_pause(runs):
    assert runs.resumed.step == runs.unpaused.step == 4
    for name in ("unet", "average"):
        resumed, unpaused = (getattr(run, name).state_dict() for run in (runs.resumed, runs.unpaused))
        different = [key for key, value in unpaused.items() if not torch.allclose(resumed[key], value, atol=1e-5)]
        assert different == []


def test_the_average_lags_behind_the_unet_on_its_way_from_the_start(start, runs):
    unet, average = runs.unpaused.unet.state_dict(), runs.unpaused.average.state_dict()
    for name in ("out.2.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"):
        way, lag = (unet[name] - start[name]).norm(), (unet[name] - average[name]).norm()
        assert 0 < lag < way


def test_every_weight_has_learned(start, runs):
    """That is, has moved further than weight decay alone would have moved it."""
    learned = runs.unpaused.unet.state_dict()
    decay = {name: (2e-5 if value.ndim == 1 else 1e-4) * value.norm() for name, value in start.items()}  # twice that
    assert [name for name, value in start.items() if (learned[name] - value).norm() <= decay[name]] == []


def test_the_loss_on_what_was_learned_falls(pool, runs, new_training):
    """Chance depends on the step alone: step 0 again is the same scenes, noise and noise levels."""
    training = new_training()
    training.load()
    for _ in range(10):
        training.learn(pool, BATCH, factor=0.5)
    training.step = 0
    assert training.learn(pool, BATCH, factor=0.0) < 0.95 * runs.losses[0]


def test_what_is_exported_is_the_average_and_the_autoencoder(module, runs, autoencoder_file, tmp_path, monkeypatch):
    from sa_inject.demo.base import weights

    (runs.folder / "autoencoder.pt").write_bytes(autoencoder_file.read_bytes())
    path = tmp_path / "weights.safetensors"
    monkeypatch.setattr(weights, "write_weights", functools.partial(weights.write_weights, path=path))
    module.export(runs.folder)
    saved = torch.load(runs.folder / "unet.pt", weights_only=True)["average"]
    expected = {f"model.diffusion_model.{name}": value for name, value in saved.items()}
    autoencoder = torch.load(autoencoder_file, weights_only=True)
    expected |= {f"first_stage_model.{name}": value for name, value in autoencoder.items()}
    exported = weights.read_weights(path)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].half()) for name, value in exported.items())
    path.unlink()


def test_a_run_that_adopts_the_shipped_weights_begins_with_them(module, new_training, start, tmp_path, monkeypatch):
    from sa_inject.demo.base import weights

    shipped = weights.write_weights(start, {"vae_scale": torch.tensor(0.25)}, tmp_path / "weights.safetensors")
    monkeypatch.setattr(weights, "read_parts", functools.partial(weights.read_parts, shipped))
    module.start_from_shipped_weights(tmp_path)
    training = new_training()
    for part in (training.unet, training.average):
        torch.nn.init.zeros_(part.get_parameter("time_embed.0.weight"))
    training.folder = tmp_path
    training.load()
    assert training.step == 0
    for part in (training.unet, training.average):
        assert all(torch.equal(value, start[name].half().float()) for name, value in part.state_dict().items())
    assert torch.load(tmp_path / "autoencoder.pt", weights_only=True) == {"vae_scale": torch.tensor(0.25)}
    (tmp_path / "unet.pt").unlink()
    torch.save({"vae_scale": torch.tensor(0.5)}, tmp_path / "autoencoder.pt")  # trained for this run
    module.start_from_shipped_weights(tmp_path)
    assert torch.load(tmp_path / "autoencoder.pt", weights_only=True) == {"vae_scale": torch.tensor(0.5)}
    (tmp_path / "unet.pt").unlink()
    shipped.unlink()


def test_a_folder_with_a_run_in_it_adopts_nothing(module, tmp_path):
    (tmp_path / "unet.pt").write_bytes(b"hours of work")
    with pytest.raises(SystemExit, match="holds a run already.*another folder"):
        module.start_from_shipped_weights(tmp_path)
    assert (tmp_path / "unet.pt").read_bytes() == b"hours of work"
