"""The quality bench on a tiny NextDiT: every choice is another training and draws, and nothing of it stays."""

from types import SimpleNamespace

import pytest
import torch

from tests.demo.conftest import artwork  # noqa: F401  # a fixture
from tests.host.adapters import load, random, relative_error

STEPS = 3


@pytest.fixture(scope="module")
def models(bench, comfy_host, tmp_path_factory):
    """A NextDiT that was never trained, in a training run's folder, as the bench loads it."""
    from bench.quality import transformers
    from bench.quality.learn import Models
    from demo.base import nextdit
    from demo.base.autoencoder import new_autoencoder

    folder = tmp_path_factory.mktemp("nextdit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nextdit.CONFIG, "n_layers", 1)
        network = nextdit.new_nextdit(1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if name.startswith("final_layer") or "adaLN" in name:
                    weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        torch.save({"average": network.state_dict()}, folder / "nextdit.pt")
        patch.setattr(transformers.weights, "read_parts", lambda: ({}, new_autoencoder(seed=3).state_dict()))
        model, clip, vae, base = transformers.nextdit_models(folder)
        again = transformers.nextdit_models(folder)[3]
    assert base == again and len(base) == 16
    yield Models(model, clip, vae, torch.float32)


@pytest.fixture(scope="module")
def task_of(models, artwork, comfy_host):  # noqa: F811
    """`task_of(...)` is one subject with few steps."""
    from bench.quality.subjects import Settings, make_subject, table_artworks
    from bench.quality.task import TrainingTask

    subject = make_subject(table_artworks(1)[0], prompts=2)
    settings = Settings(STEPS, 2, 2, 2.0, "euler", "simple")
    return lambda: TrainingTask(comfy_host, models, subject, settings, 1e-2, 1e-3)


@pytest.fixture(scope="module")
def learned(task_of, models):
    """Each choice's adapter and latents."""
    from bench.quality.drawing import sample
    from bench.quality.methods import learned_adapter, trained_model
    from bench.quality.transformers import CHOICES, as_changed

    def learn(name: str) -> SimpleNamespace:
        assert name in CHOICES
        task = task_of()
        with as_changed(name, models.model.model.diffusion_model):
            adapter, clip = learned_adapter(task)
            trained = trained_model(task, adapter, clip, strength=1.0)
            latents = sample(task, trained, task.subject.prompt_texts(trained.words), 1, [0, 1])
        return SimpleNamespace(adapter=adapter, latents=latents)

    names = ("as it is", "positions none", "positions same", "references read at 0.5", "keys before the norm")
    return {name: learn(name) for name in names}


def test_every_choice_is_another_training_and_another_picture(learned):
    values = [torch.cat([t.flatten() for t in found.adapter.lora.state_dict().values()]) for found in learned.values()]
    for place, value in enumerate(values):
        assert all(not torch.equal(value, other) for other in values[:place])
    latents = [found.latents for found in learned.values()]
    assert all(latent.shape == (2, 4, 16, 16) and latent.isfinite().all() for latent in latents)
    assert all(not torch.equal(latents[0], other) for other in latents[1:])


def test_rule_of_positions_is_in_the_adapter(learned):
    rules = {name: found.adapter.info.positions for name, found in learned.items()}
    assert (rules["positions none"], rules["positions same"]) == ("none", "same")
    assert rules["as it is"] == rules["keys before the norm"] == "index"


def test_keys_before_the_norm_are_the_frozen_ones_while_the_lora_is_fresh(bench, models, task_of):
    from bench.quality.transformers import KeysBeforeNorm
    from sa_inject.core.image_prompt import TextConditioning
    from sa_inject.core.lora import SelfAttentionLoRA
    from sa_inject.core.reference import KVRecorder
    from sa_inject.nodes.host.networks.registry import attending, call_network, describe, network_inputs

    base = load(models.model).model
    layers = describe(models.model).layers
    lora = SelfAttentionLoRA(layers, 4, 4.0, torch.Generator().manual_seed(0))
    found = []
    with torch.inference_mode():
        deltas = lora.deltas(torch.device("cpu"), torch.float32)
        inputs = network_inputs(
            base, random(1, 4, 8, 8), torch.tensor([0.5]), TextConditioning(random(1, 5, 256)), torch.float32
        )
        for kind in (KVRecorder, type("Before", (KeysBeforeNorm,), {"network": base.diffusion_model})):
            recorder = kind([layer.key for layer in layers], deltas, positions="index")
            with attending(
                base.diffusion_model, {}, recorder.at, recorder.wanted, size=(8, 8), keeps_hidden=True
            ) as options:
                call_network(base.diffusion_model, inputs, options)
            found.append(recorder.bank)
    for key, recorded in found[0].items():
        assert relative_error(found[1][key].kv.k, recorded.kv.k) < 1e-5


@pytest.mark.parametrize("name", ["base", "textual inversion", "PEFT LoRA"])
def test_methods_draw_and_have_a_loss_and_leave_the_network_as_it_is(name, task_of, models):
    from bench.quality.drawing import sample
    from bench.quality.transformers import METHODS
    from bench.quality.validation_loss import LEVELS, unseen_loss

    network = load(models.model).model.diffusion_model
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    task = task_of()
    trained = METHODS[name].train(task)
    latents = sample(task, trained, task.subject.prompt_texts(trained.words), 1, [0, 1])
    assert latents.isfinite().all()
    losses = unseen_loss(task, trained)
    assert len(losses) == len(LEVELS) and all(0 < loss < 10 for loss in losses)
    network = load(models.model).model.diffusion_model  # without the patches of what was drawn with
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
