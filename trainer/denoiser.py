"""The interface of a model for the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..core.image_prompt import TextConditioning
from ..core.injection import Reference
from ..core.kv import BlockKey
from ..core.lora import LoRADeltas

References = Mapping[BlockKey, Reference]  # one row per example: kv (b, m, heads*d)


class Denoiser(Protocol):
    """A frozen diffusion model for training. Gradients reach the token embedding and the LoRA deltas."""

    sigmas: Tensor  # (t,) all noise levels of the model's schedule, ascending

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Encode captions with the token embedding, one row each."""
        ...

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Noise latents (b, c, h, w) to their noise levels (b,)."""
        ...

    def output_scale(self, sigma: Tensor) -> Tensor:
        """d(denoised)/d(network output) at every sigma: (b,) -> (b, 1, 1, 1)."""
        ...

    def read_reference(
        self, latent: Tensor, sigma: Tensor | None, text: TextConditioning, mask: Tensor | None, deltas: LoRADeltas
    ) -> References:
        """Run the reference pass on latents (b, c, h, w), at sigma (b,), or without noise if None.

        mask (b, h, w) in 0..1 removes reference tokens. Gradients reach the deltas only.
        """
        ...

    def denoise(self, noisy: Tensor, sigma: Tensor, text: TextConditioning, references: References | None) -> Tensor:
        """Predict the clean latents (b, c, h, w), float32. references: the result of the reference pass, or None."""
        ...
