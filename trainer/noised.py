"""Noised pairs of one shape: the input of one denoising call in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.adapter import ReferenceMode
from .examples import Example, Pair


class NoisedPairs(NamedTuple):
    """Pairs with noise levels (b,) and noises (b, c, h, w). A clean reference has no noise."""

    pairs: Sequence[Pair]
    sigma: Tensor
    noise: Tensor
    reference_noise: Tensor | None

    def rows(self, indices: Sequence[int]) -> NoisedPairs:
        """Select rows with their noise."""
        if list(indices) == list(range(len(self.pairs))):
            return self
        indices = list(indices)
        reference_noise = None if self.reference_noise is None else self.reference_noise[indices]
        pairs = [self.pairs[index] for index in indices]
        return NoisedPairs(pairs, self.sigma[indices], self.noise[indices], reference_noise)


def noised_pairs(pairs: Sequence[Pair], sigma: Tensor, mode: ReferenceMode, generator: torch.Generator) -> NoisedPairs:
    """Draw the noise of pairs of one shape: of the targets, then of the references."""
    noise = _noise([pair.target for pair in pairs], generator)
    references = [pair.reference for pair in pairs if pair.reference is not None]
    # Independent noise: shared noise would reveal where the reference's details belong.
    reference_noise = _noise(references, generator) if references and mode == "noised" else None
    return NoisedPairs(pairs, sigma, noise, reference_noise)


def stack_latents(examples: Sequence[Example], device: torch.device) -> Tensor:
    return torch.cat([example.latent for example in examples]).to(device, torch.float32)  # (b, c, h, w)


def stack_masks(examples: Sequence[Example], device: torch.device) -> Tensor | None:
    """Stack masks, with ones for pictures without. None if no picture has one. -> (b, h, w)"""
    if all(example.mask is None for example in examples):
        return None
    masks = [torch.ones(example.latent.shape[-2:]) if example.mask is None else example.mask for example in examples]
    return torch.stack(masks).to(device, torch.float32)


def _noise(examples: Sequence[Example], generator: torch.Generator) -> Tensor:
    return torch.randn((len(examples), *examples[0].latent.shape[1:]), generator=generator)
