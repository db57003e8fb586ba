"""ComfyUI's model and text encoder as the training loop's Denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....core.image_prompt import TextConditioning
from ....core.injection import Reference, inject
from ....core.kv import KV
from ....core.layers import SelfAttentionLayer
from ....core.lora import LoRADeltas
from ....core.masks import token_mask
from ....core.positions import PositionRule
from ....core.reference import KVRecorder, run_reference_pass
from ....core.site import Site
from ....trainer.denoiser import References
from ..networks.registry import attending, call_network, model_conditions, network_inputs
from ..networks.unet import clean_reference_sigma
from ..text import encode_text
from .autograd import differentiable_options

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.sd import CLIP

    from ..host_types import ModelSampling


class ComfyDenoiser:
    """Implements trainer.Denoiser. The model must be loaded and differentiable.

    latent, noise, noisy (b, c, h, w), sigma (b,)
    """

    def __init__(
        self,
        base: BaseModel,
        sampling: ModelSampling,
        clip: CLIP,
        layers: Sequence[SelfAttentionLayer],
        device: torch.device,
        dtype: torch.dtype,
        positions: PositionRule = "none",
        known_texts: Mapping[str, TextConditioning] | None = None,
    ) -> None:
        """known_texts: encoded captions. With all captions in it, the CLIP is not used and need not be loaded."""
        self.sigmas = sampling.sigmas
        self._device = device
        self._base = base
        self._sampling = sampling
        self._clip = clip
        self._blocks = tuple(layer.key for layer in layers)
        self._dtype = dtype
        self._positions: PositionRule = positions
        self._known_texts = dict(known_texts or {})

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        different = list(dict.fromkeys(captions))
        if all(caption in self._known_texts for caption in different):
            text = TextConditioning.stack([self._known_texts[caption] for caption in different])
        else:
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
        # A clone, because some versions of ComfyUI change the noise in place.
        return self._sampling.noise_scaling(_per_row(sigma), noise.clone(), latent)

    def output_scale(self, sigma: Tensor) -> Tensor:
        one, zero = torch.ones_like(_per_row(sigma)), torch.zeros_like(_per_row(sigma))
        denoised = self._sampling.calculate_denoised
        return denoised(sigma, one, zero) - denoised(sigma, zero, zero)

    def read_reference(
        self, latent: Tensor, sigma: Tensor | None, text: TextConditioning, mask: Tensor | None, deltas: LoRADeltas
    ) -> References:
        network = self._base.diffusion_model
        recorder = KVRecorder(self._blocks, deltas, stop_at=self._blocks[-1], positions=self._positions)
        if sigma is None:
            sigma = torch.full((latent.shape[0],), clean_reference_sigma(self._sampling), device=latent.device)
        inputs = network_inputs(self._base, latent, sigma, text, self._dtype)
        size = latent.shape[-2:]
        with attending(
            network, differentiable_options(), recorder.at, self._blocks, size=size, keeps_hidden=True
        ) as options:
            bank = run_reference_pass(lambda: call_network(network, inputs, options), recorder)
        sizes = set() if mask is None else {(recorded.height, recorded.width) for recorded in bank.values()}
        kept = {size: token_mask(mask, *size).to(latent.device) for size in sizes if mask is not None}
        return {
            key: Reference(kv, key_mask=kept.get((height, width)), positions=self._positions)
            for key, (kv, height, width) in bank.items()
        }

    def denoise(self, noisy: Tensor, sigma: Tensor, text: TextConditioning, references: References | None) -> Tensor:
        groups = text.by_length()
        if len(groups) == 1:
            return self._denoise(noisy, sigma, text, references or {})
        # The result of some networks depends on the text's length. They get only texts of one length in a call.
        parts = [
            self._denoise(noisy[rows], sigma[rows], text.take(rows), _rows_of(references or {}, rows))
            for rows in groups
        ]
        order = torch.tensor([row for rows in groups for row in rows], device=noisy.device)
        return torch.cat(parts)[order.argsort()]

    def _denoise(self, noisy: Tensor, sigma: Tensor, text: TextConditioning, references: References) -> Tensor:
        def at(site: Site) -> Tensor:
            return inject(site, [references[site.key]])  # every row attends to its own reference

        conditions = model_conditions(self._base, noisy, text)
        network, size = self._base.diffusion_model, noisy.shape[-2:]
        with attending(network, differentiable_options(), at, references, size=size) as options:
            return self._base.apply_model(noisy, sigma, transformer_options=options, **conditions)


def _rows_of(references: References, rows: list[int]) -> References:
    return {
        key: reference._replace(
            kv=KV(reference.kv.k[rows], reference.kv.v[rows]),
            key_mask=None if reference.key_mask is None else reference.key_mask[rows],
        )
        for key, reference in references.items()
    }


def _per_row(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)
