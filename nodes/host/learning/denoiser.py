"""ComfyUI's model and text encoder as the training loop's Denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.image_prompt import TextConditioning
from ....core.injection import Reference, inject
from ....core.layers import SelfAttentionLayer
from ....core.lora import LoRADeltas
from ....core.masks import token_mask
from ....core.reference import KVRecorder, run_reference_pass
from ....core.site import Site
from ....trainer.denoiser import References
from ..networks.unet import clean_reference_sigma, model_conditions, network_inputs
from ..networks.unet_sites import attending
from ..text import encode_text
from .autograd import differentiable_options


class ComfyDenoiser:
    """Implements trainer.Denoiser. The model is loaded, made differentiable, and stays so while this is used."""

    def __init__(
        self,
        base: Any,
        sampling: Any,
        clip: Any,
        layers: Sequence[SelfAttentionLayer],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.sigmas = sampling.sigmas
        self._device = device
        self._base = base
        self._sampling = sampling
        self._clip = clip
        self._blocks = tuple(layer.key for layer in layers)
        self._dtype = dtype

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        different = list(dict.fromkeys(captions))
        text = encode_text(self._clip, different)
        if not text.cross_attn.isfinite().all():
            raise ValueError(
                f"The text encoder's result for '{different[0]}' is not a number (NaN), so nothing can be learned. "
                "Connect a CLIP whose file is whole, such as the base model's own, or start ComfyUI with "
                "--fp32-text-enc."
            )
        if len(different) < len(captions):
            text = text.take([different.index(caption) for caption in captions])
        return text.to(self._device)

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        # A clone, because some versions add to the noise in place.
        return self._sampling.noise_scaling(_per_row(sigma), noise.clone(), latent)

    def output_scale(self, sigma: Tensor) -> Tensor:
        one, zero = torch.ones_like(_per_row(sigma)), torch.zeros_like(_per_row(sigma))
        denoised = self._sampling.calculate_denoised
        return denoised(sigma, one, zero) - denoised(sigma, zero, zero)

    def read_reference(
        self, latent: Tensor, sigma: Tensor | None, text: TextConditioning, mask: Tensor | None, deltas: LoRADeltas
    ) -> References:
        network = self._base.diffusion_model
        recorder = KVRecorder(self._blocks, deltas, stop_at=self._blocks[-1])
        if sigma is None:
            sigma = torch.full((latent.shape[0],), clean_reference_sigma(self._sampling), device=latent.device)
        inputs = network_inputs(self._base, latent, sigma, text, self._dtype)
        with attending(network, differentiable_options(), recorder.at, self._blocks, keeps_hidden=True) as options:
            bank = run_reference_pass(lambda: network(*inputs, None, options), recorder)
        if mask is None:
            return {key: Reference(recorded.kv) for key, recorded in bank.items()}
        sizes = {(recorded.height, recorded.width) for recorded in bank.values()}
        kept = {size: token_mask(mask, *size).to(latent.device) for size in sizes}
        return {key: Reference(kv, key_mask=kept[height, width]) for key, (kv, height, width) in bank.items()}

    def denoise(self, noisy: Tensor, sigma: Tensor, text: TextConditioning, references: References | None) -> Tensor:
        def at(site: Site) -> Tensor:
            return inject(site, [given[site.key]])  # every row attends to its own reference

        given = references or {}
        conditions = model_conditions(self._base, noisy, text)
        with attending(self._base.diffusion_model, differentiable_options(), at, given) as options:
            return self._base.apply_model(noisy, sigma, transformer_options=options, **conditions)


def _per_row(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)
