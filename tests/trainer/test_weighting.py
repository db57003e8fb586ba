"""Min-SNR-gamma: one formula in the space of the network's output, for what the paper states for each kind of model."""

import pytest
import torch

from sa_inject.trainer.objective import prediction_loss
from sa_inject.trainer.weighting import min_snr_weight, signal_to_noise, with_background
from tests.trainer.test_loop import GivenPairs, Pair, pictures
from tests.trainer.test_options import run
from tests.trainer.tiny_denoiser import example, fresh_subject

SIGMA = torch.tensor([0.05, 0.4, 1.0, 3.0, 12.0])
SNR = SIGMA**-2
# d(clean picture)/d(network output), as the three kinds of model have it at unit variance
SCALES = {"eps": -SIGMA, "v": -SIGMA / (SIGMA**2 + 1).sqrt(), "x0": torch.ones(5)}
PAPER = {"eps": lambda low: low / SNR, "v": lambda low: low / (SNR + 1), "x0": lambda low: low}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("gamma", [0.01, 1.0, 5.0, 1e9])
def test_weight_is_the_one_of_the_paper(kind, gamma):
    weight = min_snr_weight(SNR, SCALES[kind].view(-1, 1, 1, 1), gamma)
    torch.testing.assert_close(weight, PAPER[kind](SNR.clamp(max=gamma)))


@pytest.mark.parametrize("kind", SCALES)
def test_weighted_loss_is_the_clean_pictures_own_times_the_smaller_of_snr_and_gamma(kind):
    generator = torch.Generator().manual_seed(2)
    denoised, latent = (torch.randn(5, 4, 3, 3, generator=generator) for _ in range(2))
    scale = SCALES[kind].view(-1, 1, 1, 1)
    found = prediction_loss(denoised, latent, scale) * min_snr_weight(SNR, scale, 5.0)
    expected = (denoised - latent).square().mean(dim=(1, 2, 3)) * SNR.clamp(max=5.0)
    torch.testing.assert_close(found, expected)


def test_signal_to_noise_is_asked_of_the_denoiser():
    torch.testing.assert_close(signal_to_noise(fresh_subject().denoiser, SIGMA), SNR)

    class Flow:
        def add_noise(self, latent, noise, sigma):
            return (1 - sigma.view(-1, 1, 1, 1)) * latent + sigma.view(-1, 1, 1, 1) * noise

    torch.testing.assert_close(signal_to_noise(Flow(), torch.tensor([0.25, 0.5])), torch.tensor([9.0, 1.0]))


def test_step_counts_its_noise_level_as_the_weight_says():
    def loss(gamma: float, level: int) -> tuple[float, float]:
        subject = fresh_subject()
        subject.denoiser.sigmas = subject.denoiser.sigmas[level : level + 1]
        sigma = subject.denoiser.sigmas.item()
        return next(
            run(subject, GivenPairs([Pair(example(0), "sks", example(1))]), 1, {"min_snr_gamma": gamma})
        ).loss, sigma

    for level in (0, 10, 19):
        (plain, sigma), (weighted, _) = loss(0.0, level), loss(5.0, level)
        assert weighted == pytest.approx(plain * min(sigma**-2, 5.0) * sigma**2, rel=1e-4)


def test_large_gamma_is_the_loss_of_an_eps_model_itself():
    plain, weighted = (
        [step.loss for step in run(fresh_subject(), pictures(), 3, {"min_snr_gamma": gamma})] for gamma in (0.0, 1e9)
    )
    assert weighted == pytest.approx(plain, rel=1e-4)


def test_background_of_a_mask():
    mask = torch.tensor([[0.0, 0.5, 1.0]])
    assert with_background(mask, 0.0) is mask
    assert with_background(None, 0.7) is None
    torch.testing.assert_close(with_background(mask, 0.2), torch.tensor([[0.2, 0.6, 1.0]]))
    assert torch.equal(with_background(mask, 1.0), torch.ones(1, 3))
