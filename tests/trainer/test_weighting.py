"""Min-SNR-gamma: one formula in the space of the network's output, for what the paper states for each kind of model."""

from collections.abc import Callable

import pytest
import torch

from sa_inject.trainer.objective import prediction_loss
from sa_inject.trainer.options import FLOW_WEIGHTINGS, TrainOptions
from sa_inject.trainer.weighting import flow_weight, min_snr_weight, signal_to_noise, with_background
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


LEVELS = torch.linspace(0.001, 1.0, 1000)


@pytest.mark.parametrize("kind", FLOW_WEIGHTINGS)
def test_weights_of_a_flow_have_the_mean_one(kind):
    assert flow_weight(kind, LEVELS, LEVELS).mean().item() == pytest.approx(1.0, rel=1e-4)


def test_weights_of_a_flow_are_those_of_diffusers():
    """`compute_loss_weighting_for_sd3` but for a factor that is the same at all levels."""
    sigma = torch.tensor([0.1, 0.5, 0.9])
    expected = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))}
    for kind, weights in expected.items():
        found = flow_weight(kind, sigma, LEVELS)
        torch.testing.assert_close(found / found[1], weights / weights[1], rtol=1e-3, atol=0)
    assert torch.equal(flow_weight("uniform", sigma, LEVELS), torch.ones(3))


def test_logit_normal_weights_are_the_share_of_levels_that_others_draw():
    """Also where the levels themselves are shifted, as for high resolutions."""
    drawn = torch.sigmoid(torch.randn(400_000, generator=torch.Generator().manual_seed(0)))
    shares = torch.histc(drawn, bins=10, min=0, max=1) / len(drawn)
    for levels in (LEVELS, 3 * LEVELS / (1 + 2 * LEVELS)):
        weights = flow_weight("logit_normal", levels, levels)
        torch.testing.assert_close(weights.view(10, 100).mean(dim=1) / 10, shares, rtol=0.02, atol=1e-3)


def test_two_weightings_of_noise_levels_are_refused_together():
    with pytest.raises(ValueError, match="both weight the noise levels"):
        TrainOptions(flow_weighting="cosmap", min_snr_gamma=5.0)
    with pytest.raises(ValueError, match="flow_weighting is 'none'; it is one of uniform, logit_normal"):
        TrainOptions(flow_weighting="none")  # type: ignore[arg-type]  # what a file may say


def test_step_counts_the_level_of_a_flow_as_the_weight_says():
    def loss(kind: str) -> float:
        pair = Pair(example(0), "sks", example(1))
        return next(run(fresh_subject(), GivenPairs([pair]), 1, {"flow_weighting": kind})).loss

    levels = fresh_subject().denoiser.sigmas
    place = next(
        at for at, weight in enumerate(flow_weight("cosmap", levels, levels)) if _is(loss("cosmap"), weight, loss)
    )
    for kind in FLOW_WEIGHTINGS:
        assert _is(loss(kind), flow_weight(kind, levels, levels)[place], loss)


def _is(weighted: float, weight: torch.Tensor, loss: Callable[[str], float]) -> bool:
    return weighted == pytest.approx(loss("uniform") * weight.item(), rel=1e-4)
