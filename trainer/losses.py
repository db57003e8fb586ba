"""The losses of one step: denoising, and prior preservation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.image_prompt import TextConditioning
from ..core.lora import SelfAttentionLoRA
from .config import TrainConfig
from .denoiser import Denoiser, References
from .noised import NoisedPairs, stack_latents, stack_masks
from .objective import prediction_loss
from .prior import frozen_prediction_loss
from .weighting import flow_weight, min_snr_weight, signal_to_noise, with_background


class Loss(NamedTuple):
    """A mean over rows, (), and whether the next loss shares a part of this one's graph."""

    value: Tensor
    shares_its_graph: bool = False


class PairLosses:
    """`trains_token_embedding`: captions are encoded again in each step."""

    def __init__(
        self,
        denoiser: Denoiser,
        lora: SelfAttentionLoRA,
        reference_caption: str,
        config: TrainConfig,
        device: torch.device,
        compute_dtype: torch.dtype,
        has_class_pictures: bool,
    ) -> None:
        self.trains_token_embedding = config.token_learning_rate > 0
        self._uses_frozen_prior = config.options.prior_weight > 0 and not has_class_pictures
        self._denoiser = denoiser
        self._lora = lora
        self._config = config
        self._device = device
        self._compute_dtype = compute_dtype
        self._texts: dict[str, TextConditioning] = {}  # by caption, if the token embedding is frozen
        with torch.no_grad():
            self.reference_text = denoiser.encode([reference_caption])

    def of_pairs(self, part: NoisedPairs) -> Iterator[Loss]:
        """The model's own loss, and the prior preservation loss if there are no class pictures."""
        latent, noisy = self._noised_targets(part)
        references = self._read_references(part)
        keeps_class = self._uses_frozen_prior and references is not None
        yield Loss(self._prediction_loss(part, latent, noisy, references), keeps_class)
        if keeps_class and references is not None:
            scale = self._denoiser.output_scale(part.sigma)
            text = self.reference_text.expand(len(part.pairs))
            moved = frozen_prediction_loss(self._denoiser, noisy, part.sigma, text, references, scale)
            yield Loss(self._config.options.prior_weight * (moved * self._level_weights(part.sigma, scale)).mean())

    def of_class_pairs(self, part: NoisedPairs) -> Iterator[Loss]:
        latent, noisy = self._noised_targets(part)
        yield Loss(self._prediction_loss(part, latent, noisy, self._read_references(part)))

    def _noised_targets(self, part: NoisedPairs) -> tuple[Tensor, Tensor]:
        latent = stack_latents([pair.target for pair in part.pairs], self._device)  # (b, c, h, w)
        return latent, self._denoiser.add_noise(latent, part.noise.to(latent), part.sigma)

    def _read_references(self, part: NoisedPairs) -> References | None:
        references = [pair.reference for pair in part.pairs if pair.reference is not None]
        if not references:
            return None
        latent, sigma = stack_latents(references, self._device), None
        if part.reference_noise is not None:
            sigma = part.sigma
            latent = self._denoiser.add_noise(latent, part.reference_noise.to(latent), sigma)
        return self._denoiser.read_reference(
            latent,
            sigma,
            text=self.reference_text.expand(len(references)),
            mask=stack_masks(references, self._device),
            deltas=self._lora.deltas(self._device, self._compute_dtype),
        )

    def _prediction_loss(
        self, part: NoisedPairs, latent: Tensor, noisy: Tensor, references: References | None
    ) -> Tensor:
        """Mean loss of the rows. -> ()"""
        text = self._encode_captions([pair.caption for pair in part.pairs])
        denoised = self._denoiser.denoise(noisy, part.sigma, text, references)
        mask = stack_masks([pair.target for pair in part.pairs], self._device)
        mask = with_background(mask, self._config.options.background_weight)
        scale = self._denoiser.output_scale(part.sigma)
        loss = prediction_loss(denoised, latent, scale, None if mask is None else mask[:, None])  # (b,)
        return (loss * self._level_weights(part.sigma, scale)).mean()

    def _level_weights(self, sigma: Tensor, output_scale: Tensor) -> Tensor | float:
        gamma, flow = self._config.options.min_snr_gamma, self._config.options.flow_weighting
        if flow != "uniform":
            return flow_weight(flow, sigma, self._denoiser.sigmas)
        if gamma == 0:
            return 1.0
        return min_snr_weight(signal_to_noise(self._denoiser, sigma), output_scale, gamma)

    def _encode_captions(self, captions: Sequence[str]) -> TextConditioning:
        """Encode captions, one row each. With a frozen token embedding, each caption is encoded once."""
        if self.trains_token_embedding:
            return self._denoiser.encode(captions)
        with torch.no_grad():
            for caption in captions:
                if caption not in self._texts:
                    self._texts[caption] = self._denoiser.encode([caption])
        return TextConditioning.stack([self._texts[caption] for caption in captions])
