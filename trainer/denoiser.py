"""The seam between training and a model: all that the training loop ever asks of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..core.image_prompt import TextConditioning
from ..core.injection import Reference
from ..core.kv import BlockKey
from ..core.lora import LoRADeltas

References = Mapping[BlockKey, Reference]  # row-aligned: kv (b, m, heads*d)


class Denoiser(Protocol):
    """A frozen diffusion model, seen from the training loop. Gradients reach the learned word and the deltas."""

    sigmas: Tensor  # (t,) every noise level of the model's schedule, ascending

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Encode captions, one row each, with the learned word in them."""
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
        """Run the reference pass on latents (b, c, h, w), at sigma (b,) or free of noise when None.

        mask (b, h, w) in 0..1 hides reference tokens. Gradients reach the deltas, and nothing before them.
        """
        ...

    def denoise(self, noisy: Tensor, sigma: Tensor, text: TextConditioning, references: References | None) -> Tensor:
        """Predict the clean latents, float32, attending to the references where there are any."""
        ...
