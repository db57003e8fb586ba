"""Training on diffusion transformers: gradients, what stays, and a whole run through the node."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.adapters import load, random, relative_error
from tests.host.tiny_transformers import TRANSFORMERS, tiny_clip, tiny_transformer, tiny_vae
from tests.host.transformer_adapters import apply, make_adapter, sample, text_for

CLIPS = {"z_image": "z_image", "flux_dev": "flux", "chroma": "chroma"}


class Setup:
    """A network whose gradients flow, its denoiser, and one batch of two rows with texts of unlike length."""

    def __init__(self, model: Any, undo: Any, checkpointing: bool, positions: str) -> None:
        from sa_inject.core.image_prompt import TextConditioning
        from sa_inject.nodes.host.learning import transformer_blocks
        from sa_inject.nodes.host.learning.autograd import make_differentiable, memory_efficient_layers
        from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser
        from sa_inject.nodes.host.networks.registry import hooked

        self.base = load(model).model
        network = self.base.diffusion_model
        make_differentiable(self.base)
        undo.enter_context(memory_efficient_layers(network))
        undo.enter_context(hooked(network))
        undo.enter_context(transformer_blocks.out_of_place_blocks(network))
        if checkpointing:
            undo.enter_context(transformer_blocks.checkpoint_blocks(network))
        self.adapter = make_adapter(model, positions)
        for parameter in self.adapter.lora.parameters():
            parameter.requires_grad_(True)
        sampling, cpu = model.get_model_object("model_sampling"), torch.device("cpu")
        layers = self.adapter.info.layers
        self.denoiser = ComfyDenoiser(self.base, sampling, None, layers, cpu, torch.float32, positions)
        texts = [text_for(model, tokens, seed=tokens) for tokens in (6, 11)]
        texts = [text._replace(lengths=(text.cross_attn.shape[1],)) for text in texts]
        self.text = TextConditioning.stack(texts)
        read = text_for(model, 5, seed=3)
        self.read_text = TextConditioning.stack([read, read])
        channels = model.model.latent_format.latent_channels
        self.latent, self.reference, noise = (random(2, channels, 8, 6, seed=seed) for seed in (1, 2, 4))
        self.sigma = torch.tensor([0.4, 0.7])
        self.noisy = self.denoiser.add_noise(self.latent, noise, self.sigma)
        self.mask = torch.ones(2, 8, 6)
        self.mask[1, :, 3:] = 0

    def loss(self) -> Tensor:
        from sa_inject.trainer.objective import prediction_loss

        deltas = self.adapter.lora.deltas(torch.device("cpu"), torch.float32)
        bank = self.denoiser.read_reference(self.reference, None, self.read_text, self.mask, deltas)
        denoised = self.denoiser.denoise(self.noisy, self.sigma, self.text, bank)
        return prediction_loss(denoised, self.latent, self.denoiser.output_scale(self.sigma)).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_gradients_agree_with_finite_differences(comfy_host, kind, checkpointing):
    import contextlib

    from sa_inject.nodes.host.learning.autograd import training_mode

    model = tiny_transformer(kind)
    with torch.inference_mode(), training_mode(), contextlib.ExitStack() as undo:
        setup = Setup(model, undo, checkpointing, "index")
        setup.loss().backward()
        parameters = dict(setup.adapter.lora.named_parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 0 for p in parameters.values())
        assert all(weight.grad is None for weight in setup.base.parameters())
        # Along the gradient, where the difference is far above rounding.
        length = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
        step = 2e-3 / length
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                for p in parameters.values():
                    p += sign * step * p.grad
                losses.append(setup.loss().double())
                for p in parameters.values():
                    p -= sign * step * p.grad
        slope = (losses[0] - losses[1]) / (2 * step)
    assert slope.item() == pytest.approx(float(length**2), rel=3e-2)
    network = model.model.diffusion_model
    assert [module for module in network.modules() if "forward" in vars(module) or module._forward_pre_hooks] == []


def test_rows_with_texts_of_unlike_length_are_those_that_they_are_alone(comfy_host):
    import contextlib

    from sa_inject.nodes.host.learning.autograd import training_mode

    with torch.inference_mode(), training_mode(), contextlib.ExitStack() as undo, torch.no_grad():
        setup = Setup(tiny_transformer("z_image"), undo, False, "none")
        both = setup.denoiser.denoise(setup.noisy, setup.sigma, setup.text, None)
        for row in range(2):
            rows = slice(row, row + 1)
            alone = setup.denoiser.denoise(setup.noisy[rows], setup.sigma[rows], setup.text.take([row]), None)
            assert relative_error(both[rows], alone) < 1e-5


def test_noise_levels_are_the_models_own_with_its_shift(comfy_host):
    """Z-Image's schedule has a shift of 3: half of its levels lie above 0.75."""
    model = tiny_transformer("z_image")
    sigmas = model.get_model_object("model_sampling").sigmas
    assert float(sigmas[len(sigmas) // 2]) == pytest.approx(0.75, abs=1e-2)


def pictures(count: int, size: int = 64) -> Tensor:
    images = 0.4 * torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(3))
    for number, image in enumerate(images):
        image[8 + 8 * number : 32 + 8 * number, 12:44, :2] = 0.9
    return images


def train(host: Any, kind: str, model: Any, **settings) -> Any:
    widgets = {"steps": 3, "rank": 2, "resolution": 64, "previews": 0, "token_vectors": 2, "seed": 1}
    return host.execute(
        "TrainSAInjectAdapter",
        model=model,
        clip=tiny_clip(CLIPS[kind]),
        vae=tiny_vae(),
        images=pictures(3),
        file_name=f"t-{kind}",
        **{**widgets, **settings},
    )


@pytest.mark.parametrize("kind", CLIPS)
def test_node_trains_an_adapter_that_is_saved_loaded_and_drawn_with(comfy_host, kind):
    comfy_host.pack_nodes()
    model = tiny_transformer(kind)
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    plain = sample(comfy_host, model)
    captions = ["sainj", "a sainj toy", "one sainj on grass"]
    adapter, _, losses, previews, *_ = train(comfy_host, kind, model, captions=captions, previews=1)
    assert previews.shape == (1, 64, 64, 3) and previews.isfinite().all()
    assert len(losses["loss"]) == 3 and all(loss > 0 for loss in losses["loss"])
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    assert torch.equal(sample(comfy_host, model), plain)
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.lora.state_dict().items() if "lora_B" in name)
    assert adapter.info.positions == "index" and adapter.info.architecture in ("Z-Image", "Flux.1", "Chroma")
    network = model.model.diffusion_model
    assert [module for module in network.modules() if "forward" in vars(module) or module._forward_pre_hooks] == []

    loaded = comfy_host.execute(
        "LoadSAInjectAdapter", clip=tiny_clip(CLIPS[kind]), adapter_name=f"t-{kind}.safetensors"
    )[0]
    assert loaded.info == adapter.info
    (prompt,) = comfy_host.execute("EncodeImagePrompt", images=pictures(2), vae=tiny_vae(), resolution=64)
    one, other = (sample(comfy_host, apply(comfy_host, model, a, prompt)) for a in (adapter, loaded))
    assert torch.equal(one, other) and relative_error(one, plain) > 0


def test_checkpointing_learns_the_same_where_the_word_does_not_learn(comfy_host):
    comfy_host.pack_nodes()
    model, masks = tiny_transformer("z_image"), torch.zeros(3, 64, 64)
    masks[:, 4:60, 8:50] = 1
    found = {}
    for checkpointing in (False, True):
        adapter = train(
            comfy_host,
            "z_image",
            model,
            batch_size=2,
            gradient_checkpointing=checkpointing,
            token_learning_rate=0.0,
            masks=masks,
            reference_mode="noised",
        )[0]
        found[checkpointing] = adapter.lora.state_dict()
    assert found[True].keys() == found[False].keys()
    for name, tensor in found[True].items():
        assert torch.allclose(tensor, found[False][name], atol=1e-4), name


def test_noise_levels_of_a_flow_can_be_weighted(comfy_host):
    """One step from the same start: the loss is the plain one, times the weight of the level that was drawn."""
    comfy_host.pack_nodes()
    model, losses = tiny_transformer("z_image"), {}
    for kind in ("uniform", "logit_normal", "cosmap", "sigma_sqrt"):
        (settings,) = comfy_host.execute("SAInjectTrainingSettings", flow_weighting=kind)
        found = train(comfy_host, "z_image", model, steps=1, sample_every=0, settings=settings)
        losses[kind] = found[2]["loss"][0]
    assert len(set(losses.values())) == 4
    from sa_inject.trainer.weighting import flow_weight

    levels = model.get_model_object("model_sampling").sigmas
    for kind in ("cosmap", "logit_normal"):
        weights = flow_weight(kind, levels, levels)
        ratio = losses[kind] / losses["uniform"]
        assert ((weights - ratio).abs() < 1e-3 * ratio).any()


def test_weights_of_a_flow_are_refused_for_models_that_learn_none(comfy_host, load_checkpoint):
    comfy_host.pack_nodes()
    model, clip, vae = load_checkpoint("sd15")
    (settings,) = comfy_host.execute("SAInjectTrainingSettings", flow_weighting="cosmap")
    small = {"steps": 1, "resolution": 64, "previews": 0, "sample_every": 0, "settings": settings}
    with pytest.raises(ValueError, match=r"'cosmap', which is for flow models.*SD1.x and learns 'eps'.*min_snr_gamma"):
        comfy_host.execute("TrainSAInjectAdapter", model=model, clip=clip, vae=vae, images=pictures(2), **small)
