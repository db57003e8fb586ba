"""Ablations of the noise level: what references are read at, and what training starts from.

Import only after the host has started.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sa_inject.core.lora import LoRADeltas
from sa_inject.core.schedule import REFERENCE_START
from sa_inject.nodes.host.drawing.reference_pass import reference_inputs
from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser
from sa_inject.nodes.host.networks.unet import clean_reference_sigma

EXTRA_NOISE = (50, 250)  # number of noise levels that are added


class WithGenerator(ComfyDenoiser):
    """Has a separate generator, so that the loop's own random numbers do not change."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._generator = torch.Generator().manual_seed(0)


class LightlyNoised(WithGenerator):
    """Reads references with the noise level that clean references are read at."""

    def read_reference(self, latent: Tensor, sigma: Any, text: Any, mask: Any, deltas: LoRADeltas) -> Any:
        sigma = torch.full((latent.shape[0],), clean_reference_sigma(self._sampling), device=latent.device)
        noise = torch.randn(latent.shape, generator=self._generator).to(latent)
        return super().read_reference(self.add_noise(latent, noise, sigma), sigma, text, mask, deltas)


def lightly_noised_inputs(
    base: Any, adapter: Any, pictures: Any, indices: Any, sigma: Any, seed: int, like: Tensor
) -> Any:
    """The same while sampling, in place of `reference_inputs`."""
    return reference_inputs(base, adapter, pictures, indices, clean_reference_sigma(base.model_sampling), seed, like)


def lowest_sigma(sampling: Any) -> float:
    """The model's lowest noise level, in place of `clean_reference_sigma`."""
    return float(sampling.sigma_min)


class ScheduledSampling(WithGenerator):
    """Trains on the model's own prediction from a higher noise level, as in sampling (scheduled sampling)."""

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        self._clean, self._noise = latent, noise
        return super().add_noise(latent, noise, sigma)

    def denoise(self, noisy: Tensor, sigma: Tensor, text: Any, references: Any) -> Tensor:
        indices = torch.searchsorted(self.sigmas.cpu(), sigma.cpu())
        further = indices + torch.randint(*EXTRA_NOISE, indices.shape, generator=self._generator)
        highest = len(self.sigmas) - 1 if references is None else int((1 - REFERENCE_START) * len(self.sigmas))
        higher = self.sigmas[torch.maximum(further.clamp(max=highest), indices)].to(sigma)
        with torch.no_grad():
            earlier = super().add_noise(self._clean, self._noise, higher)
            denoised = super().denoise(earlier, higher, text, references)
            ratio = (sigma / higher).view(-1, 1, 1, 1)
            own = denoised + ratio * (earlier - denoised)  # one step of Euler's method
        return super().denoise(own, sigma, text, references)


class WithTimestep(ComfyDenoiser):
    """Reads a clean reference, at the timestep of the picture or at the nearest of `levels`."""

    levels: tuple[float, ...] = ()  # fractions of the schedule

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        self._clean = latent  # the reference's, if the next call reads a noised reference
        return super().add_noise(latent, noise, sigma)

    def read_reference(self, latent: Tensor, sigma: Any, text: Any, mask: Any, deltas: LoRADeltas) -> Any:
        sampling = self._sampling
        given = sigma.new_tensor([nearest_level(sampling, level, self.levels) for level in sigma.tolist()])
        one = torch.ones_like(given)
        clean = torch.full_like(given, clean_reference_sigma(sampling))
        # The network's input has the same scale as for a clean reference.
        scale = sampling.calculate_input(clean, one) / sampling.calculate_input(given, one)
        return super().read_reference(self._clean * scale.view(-1, 1, 1, 1), given, text, mask, deltas)


def nearest_level(sampling: Any, sigma: float, fractions: tuple[float, ...]) -> float:
    """The sigma at one of these fractions of the schedule that is nearest. `sigma` itself if there are none."""
    levels = [float(sampling.percent_to_sigma(1 - fraction)) for fraction in fractions]
    return min(levels, key=lambda level: abs(math.log(level / max(sigma, 1e-3))), default=sigma)


def inputs_with_timestep(levels: tuple[float, ...]) -> Callable[..., Any]:
    """The same while sampling, in place of `reference_inputs`."""

    def inputs(base: Any, adapter: Any, pictures: Any, indices: Any, sigma: Any, seed: int, like: Tensor) -> Any:
        found = reference_inputs(base, adapter, pictures, indices, None, seed, like)
        level = torch.full((len(pictures),), nearest_level(base.model_sampling, sigma, levels), device=like.device)
        return found._replace(timestep=base.model_sampling.timestep(level).float())

    return inputs


def sigma_at(share: float) -> Callable[[Any], float]:
    """Another noise level for clean references, in place of `clean_reference_sigma`."""
    return lambda sampling: float(sampling.percent_to_sigma(1 - share))
