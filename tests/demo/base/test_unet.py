"""The UNet starts as training needs it and attends as the host does. Sampling ends at a perfect model's target."""

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import unet

    return unet


@pytest.fixture(scope="module")
def open_unet(module):
    """Residual branches are open, so that all of it shows in the output."""
    return module.new_unet(seed=1, closed_std=1.0).eval()


def inputs(b: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(b, 4, 8, 8, generator=generator)
    return noisy, torch.linspace(100, 900, b), torch.randn(b, 77, 768, generator=generator)


@torch.no_grad()
def test_a_fresh_unet_predicts_nothing_and_one_with_open_branches_something(module, open_unet):
    assert not module.predict_noise(module.new_unet(seed=1), *inputs()).any()
    assert module.predict_noise(open_unet, *inputs()).std() > 0.1


def test_the_seed_decides_the_weights(module, open_unet):
    again, other = (module.new_unet(seed, closed_std=1.0).state_dict() for seed in (1, 2))
    assert all(torch.equal(value, again[name]) for name, value in open_unet.state_dict().items())
    assert not torch.equal(again["out.2.weight"], other["out.2.weight"])


@torch.no_grad()
def test_attention_spelled_out_is_the_hosts(module, open_unet):
    noisy, t, context = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        by_host = open_unet(noisy, t, context=context, transformer_options={}).float()
    ours = module.predict_noise(open_unet, noisy, t, context)
    assert ours.shape == noisy.shape and ours.dtype == torch.float32
    assert (ours - by_host).norm() < 0.02 * by_host.norm()


@torch.no_grad()
def test_the_prediction_depends_on_the_latent_the_time_and_the_words(module, open_unet):
    first, others = inputs(seed=0), inputs(seed=1)
    others = (others[0], others[1] + 50, others[2])
    predicted = module.predict_noise(open_unet, *first)
    for index in range(3):
        changed = module.predict_noise(open_unet, *first[:index], others[index], *first[index + 1 :])
        assert (changed - predicted).norm() > 0.01 * predicted.norm()


def test_noise_levels_are_the_thousand_of_stable_diffusion(module):
    levels = module.sigmas()
    assert levels.shape == (1000,) and (levels.diff() > 0).all()
    assert (levels[0].item(), levels[-1].item()) == pytest.approx((0.0292, 14.6146), rel=1e-2)


class Clairvoyant(torch.nn.Module):
    """Knows the clean latent for each row: zeros for empty words, else the context's first numbers."""

    def __init__(self, levels: Tensor):
        super().__init__()
        self.levels = levels

    def forward(self, noisy: Tensor, t: Tensor, context: Tensor, transformer_options: dict) -> Tensor:
        sigma = self.levels[t.long()].view(-1, 1, 1, 1)
        clean = context[:, 0, : noisy[0].numel()].view_as(noisy)
        return (noisy * (sigma**2 + 1).sqrt() - clean) / sigma


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_ends_where_a_perfect_unet_and_guidance_point(module, guidance, in_float32):
    context, empty = torch.randn(3, 77, 768, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 77, 768)
    empty[:, 0, 0] = 1.0
    latent = module.sample(Clairvoyant(module.sigmas()), context, empty, 8, seed=0, steps=5, guidance=guidance)
    expected = empty[:, 0, :256] + guidance * (context[:, 0, :256] - empty[:, 0, :256])
    assert torch.allclose(latent, expected.view(3, 4, 8, 8), atol=1e-3)


def test_sampling_starts_from_its_seeds_noise_at_the_highest_level(module):
    def blind(noisy: Tensor, *_, **__) -> Tensor:
        return torch.zeros_like(noisy)

    words = torch.zeros(2, 77, 768)
    first, again, other = (module.sample(blind, words, words[:1], 32, seed, steps=3) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert first.std().item() == pytest.approx(14.61, rel=0.05)
