"""The NextDiT's training learns, goes on after a pause as if there had been none, and is what the score draws with."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")]  # PyTorch's own

BATCH = 3


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import nextdit, train_nextdit

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nextdit.CONFIG, "n_layers", 1)
        yield train_nextdit


@pytest.fixture(scope="module")
def runs(module, pool, tmp_path_factory):
    """Four steps without a pause, and the same four with one half way."""
    from sa_inject.demo.base.language_model import CaptionEncoder

    folder, encoder = tmp_path_factory.mktemp("nextdit"), CaptionEncoder()

    def new():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CaptionEncoder", lambda device: encoder)
            return module.NextDiTTraining(folder, "cpu")

    with torch.compiler.set_stance("force_eager"):
        unpaused = new()
        losses = [unpaused.learn(pool, BATCH, 1.0) for _ in range(2)]
        unpaused.save()
        losses += [unpaused.learn(pool, BATCH, 1.0) for _ in range(2)]
        resumed = new()
        resumed.load()
        later = [resumed.learn(pool, BATCH, 1.0) for _ in range(2)]
        yield SimpleNamespace(folder=folder, pool=pool, unpaused=unpaused, losses=losses, resumed=resumed, later=later)


def test_a_resumed_training_is_one_without_a_pause(runs):
    assert runs.later == pytest.approx(runs.losses[2:], rel=1e-4) and len(set(runs.losses)) == 4
    assert runs.resumed.step == runs.unpaused.step == 4
    for one, other in zip(runs.resumed.average.parameters(), runs.unpaused.average.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_every_weight_has_learned(module, runs):
    """But for a norm that the host's class has and does not use."""
    start = module.new_nextdit(module.SEED).state_dict()
    learned = runs.unpaused.network.state_dict()
    assert [name for name, value in start.items() if torch.equal(learned[name], value)] == ["norm_final.weight"]


def test_the_loss_on_what_was_learned_falls(runs):
    with torch.compiler.set_stance("force_eager"):
        for _ in range(12):
            runs.resumed.learn(runs.pool, BATCH, 1.0)
        runs.resumed.step = 0
        assert runs.resumed.learn(runs.pool, BATCH, 0.0) < 0.9 * runs.losses[0]


def test_it_starts_with_the_shipped_autoencoder_and_is_scored_by_its_folder(module, autoencoder_file, tmp_path):
    from sa_inject.demo.base import score

    stages = (module.STAGES["cpu"][0]._replace(steps=0),)
    with pytest.MonkeyPatch.context() as patch:
        parts = {}, torch.load(autoencoder_file, weights_only=True)
        patch.setattr(module, "read_parts", lambda: parts)
        module.run(tmp_path, "cpu", stages)
    network = module.new_nextdit(3)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.05)
    torch.save({"average": network.state_dict()}, tmp_path / "nextdit.pt")
    (image,) = score.draw(tmp_path, ["a guitar"], steps=2, guidance=2.0, device="cpu")
    assert image.size == (128, 128)
    assert image.tobytes() != score.draw(tmp_path, ["a robot"], steps=2, guidance=2.0, device="cpu")[0].tobytes()
