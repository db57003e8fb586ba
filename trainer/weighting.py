"""Loss weights of noise levels and of parts of a picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .denoiser import Denoiser
from .options import FlowWeighting, TrainOptions


def min_snr_weight(snr: Tensor, output_scale: Tensor, gamma: float) -> Tensor:
    """Weight of each row's loss in the space of the network's output, (b,) from (b,) and (b, 1, 1, 1).

    Min-SNR-gamma (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023, section 3.4):
    the loss of the clean picture counts min(SNR, gamma). With an output F of which the clean picture is an affine
    function of slope b, that loss is b^2 times the loss of F. So the weight is min(SNR, gamma) * b^2, which is

        min(SNR, gamma) / SNR        for an eps model, b^2 = 1 / SNR
        min(SNR, gamma) / (SNR + 1)  for a v model,    b^2 = 1 / (SNR + 1)
        min(SNR, gamma)              for an x0 model,  b^2 = 1
    """
    return snr.clamp(max=gamma) * output_scale.flatten().square()


def signal_to_noise(denoiser: Denoiser, sigma: Tensor) -> Tensor:
    """(signal / noise)^2 of a noised latent at each sigma: (b,) -> (b,)"""
    zeros = torch.zeros(len(sigma), 1, 1, 1, device=sigma.device)
    signal = denoiser.add_noise(zeros + 1, zeros, sigma)
    noise = denoiser.add_noise(zeros, zeros + 1, sigma)
    return (signal / noise).square().flatten()


def flow_weight(kind: FlowWeighting, sigma: Tensor, levels: Tensor) -> Tensor:
    """Weight of each row's loss for a model that learns a flow. sigma (b,), levels (t,) of the model, ascending -> (b,)

    The names are those of sd-scripts and diffusers, the formulas those of Esser et al., "Scaling Rectified Flow
    Transformers for High-Resolution Image Synthesis", ICML 2024, section 3.1.

        uniform       1
        logit_normal  the density of a logit-normal distribution (0, 1) at the level's place u among all levels
        sigma_sqrt    1 / sigma^2
        cosmap        2 / (pi * (1 - 2 sigma + 2 sigma^2))

    They are divided by their mean over the model's levels. Levels are drawn uniformly here, where others draw u from
    the logit-normal distribution: the expected gradient is the same.
    """
    places = (torch.arange(len(levels), device=levels.device) + 0.5) / len(levels)
    of_all = _flow_weight(kind, levels, places)
    nearest = torch.searchsorted(levels, sigma.to(levels)).clamp(max=len(levels) - 1)
    return (of_all[nearest] / of_all.mean()).to(sigma)


def _flow_weight(kind: FlowWeighting, sigma: Tensor, u: Tensor) -> Tensor:
    if kind == "logit_normal":
        return torch.exp(-torch.logit(u).square() / 2) / (math.sqrt(2 * math.pi) * u * (1 - u))
    if kind == "sigma_sqrt":
        return sigma**-2
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    return torch.ones_like(sigma)


def check_flow_weighting(options: TrainOptions, prediction: str, architecture: str) -> None:
    """Raises ValueError where the noise levels of a model that learns no flow are to be weighted as a flow's."""
    if options.flow_weighting != "uniform" and prediction != "flow":
        raise ValueError(
            f"flow_weighting is '{options.flow_weighting}', which is for flow models such as Z-Image and Flux. "
            f"The connected model is {architecture} and learns '{prediction}': set flow_weighting to uniform. "
            "min_snr_gamma weights its noise levels."
        )


def with_background(mask: Tensor | None, weight: float) -> Tensor | None:
    """A mask in 0..1 whose masked-out parts have this weight."""
    if mask is None or weight == 0:
        return mask
    return mask + weight * (1 - mask)
