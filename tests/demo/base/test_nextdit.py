"""The tiny NextDiT is the host's: what trains and samples here is what the host's sampler calls."""

import importlib

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import nextdit

    return nextdit


@pytest.fixture(scope="module")
def network(module):
    """All of it shows in the output."""
    network = module.new_nextdit(seed=1).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for name, weight in network.named_parameters():
        if name.startswith("final_layer") or "adaLN" in name:
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return network


def texts_of(*lengths: int, multiple: int = 32):
    from sa_inject.demo.base.language_model import WIDTH, Texts

    generator = torch.Generator().manual_seed(0)
    return Texts.of([torch.randn(n, WIDTH, generator=generator) for n in lengths], multiple)


def noisy_of(b: int, seed: int = 0, size: int = 16) -> Tensor:
    return torch.randn(b, 4, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_fresh_network_predicts_nothing_and_the_seed_decides_it(module, network):
    one, again, other = (module.new_nextdit(seed) for seed in (1, 1, 2))
    assert not module.predict_velocity(one, noisy_of(1), torch.tensor([0.5]), texts_of(9)).any()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.x_embedder.weight, other.x_embedder.weight)
    assert module.predict_velocity(network, noisy_of(1), torch.tensor([0.5]), texts_of(9)).std() > 0.1


@torch.no_grad()
def test_a_batch_of_all_lengths_is_what_each_text_is_alone_for_the_host(module, network, in_float32):
    """The host calls with texts as long as they are, its own attention and its own noise levels."""
    texts, noisy, sigma = texts_of(5, 32, 17), noisy_of(3), torch.tensor([0.2, 0.6, 0.95])
    together = module.predict_velocity(network, noisy, sigma, texts)
    base = module.as_model(network).model
    for row, length in enumerate(texts.lengths.tolist()):
        own = slice(row, row + 1)
        conds = base.extra_conds(noise=noisy[own], device=noisy.device, cross_attn=texts.vectors[own, :length])
        conds = {name: cond.process_cond(batch_size=1, area=None).cond for name, cond in conds.items()}
        denoised = base.apply_model(noisy[own], sigma[own], **conds)
        assert torch.allclose(denoised, noisy[own] - sigma[row] * together[own], atol=1e-4)
    assert not network.cap_embedder._forward_hooks


def test_noise_levels_are_those_of_the_hosts_z_image(module, network):
    sampling = module.as_model(network).model.model_sampling
    for fraction in (0.25, 0.5, 0.9):
        expected = float(sampling.percent_to_sigma(1 - fraction))
        assert float(module.shifted(torch.tensor(fraction))) == pytest.approx(expected, abs=1e-4)


def test_the_pack_takes_it_for_z_image(module, network):
    importlib.import_module("utils.extra_config")  # before nodes.py puts comfy/, with its utils.py, on the path
    from sa_inject.nodes.host.networks.registry import describe

    architecture, layers = describe(module.as_model(network))
    assert architecture == "Z-Image" and len(layers) == module.CONFIG["n_layers"] + 2


class Clairvoyant(torch.nn.Module):
    """Knows each row's clean latent: the first numbers of its text."""

    def __init__(self, network):
        super().__init__()
        self.cap_embedder, self.cap_pad_token = torch.nn.Identity(), network.cap_pad_token

    def forward(self, noisy: Tensor, sigma: Tensor, context: Tensor, num_tokens: int, transformer_options: dict):
        return (noisy - context[:, 0, :64].view_as(noisy)) / sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_ends_where_a_perfect_network_and_guidance_point(module, network, guidance):
    texts, empty = texts_of(9, 12, 5), texts_of(3)
    latent = module.sample(Clairvoyant(network), texts, empty, 4, seed=0, steps=5, guidance=guidance)
    clean, nothing = (t.vectors[:, 0, :64] for t in (texts, empty))
    assert torch.allclose(latent, (nothing + guidance * (clean - nothing)).view(3, 4, 4, 4), atol=1e-4)
