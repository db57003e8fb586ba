"""The tiny UNet as the training loop's Denoiser: an eps model with a text encoder of one vector per word."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_inject.core.image_prompt import TextConditioning
from sa_inject.core.injection import Reference, inject
from sa_inject.core.layers import self_attention_layers
from sa_inject.core.lora import LoRADeltas, SelfAttentionLoRA
from sa_inject.core.masks import token_mask
from sa_inject.core.reference import KVRecorder, run_reference_pass
from sa_inject.core.site import Site
from sa_inject.trainer.denoiser import References
from sa_inject.trainer.examples import Example
from tests.tiny_sites import options_at_sites
from tests.tiny_unet import CONTEXT_DIM, IN_CHANNELS, TinyUNet

PLACEHOLDER = "sks"
REFERENCE_CAPTION = "teapot"
TEXT_LENGTH = 6
CPU = torch.device("cpu")


class TinyDenoiser:
    """`token` (1, width) is the vector of the placeholder token. The vectors of other words depend on their letters."""

    def __init__(self, token: nn.Parameter) -> None:
        self.unet = TinyUNet().requires_grad_(False)
        self.layers = self_attention_layers(self.unet)
        self.blocks = tuple(layer.key for layer in self.layers)
        self.sigmas = torch.logspace(-1, 1, 20)
        self.token = token

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        return TextConditioning(torch.stack([self._caption(caption) for caption in captions]))

    def _caption(self, caption: str) -> Tensor:
        words = caption.split()[:TEXT_LENGTH]
        vectors = [self.token[0] if word == PLACEHOLDER else word_vector(word) for word in words or ["nothing"]]
        return F.pad(torch.stack(vectors), (0, 0, 0, TEXT_LENGTH - len(vectors)))  # (tokens, width)

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return latent + noise * per_row(sigma)

    def output_scale(self, sigma: Tensor) -> Tensor:
        return -per_row(sigma)

    def read_reference(
        self, latent: Tensor, sigma: Tensor | None, text: TextConditioning, mask: Tensor | None, deltas: LoRADeltas
    ) -> References:
        recorder = KVRecorder(self.blocks, deltas, stop_at=self.blocks[-1])
        sigma = torch.zeros(latent.shape[0]) if sigma is None else sigma
        options = options_at_sites(self.blocks, recorder.at)
        bank = run_reference_pass(lambda: self._network(latent, sigma, text, options), recorder)
        return {
            key: Reference(kv, key_mask=None if mask is None else token_mask(mask, height, width))
            for key, (kv, height, width) in bank.items()
        }

    def denoise(self, noisy: Tensor, sigma: Tensor, text: TextConditioning, references: References | None) -> Tensor:
        def at(site: Site) -> Tensor:
            return inject(site, [given[site.key]])

        given = references or {}
        epsilon = self._network(noisy, sigma, text, options_at_sites(given, at))
        return noisy - per_row(sigma) * epsilon

    def _network(self, noisy: Tensor, sigma: Tensor, text: TextConditioning, options: dict) -> Tensor:
        scaled = noisy / (per_row(sigma).square() + 1).sqrt()
        return self.unet(scaled, 1000 * sigma / (sigma + 1), text.cross_attn, transformer_options=options)


def word_vector(word: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
    return torch.randn(CONTEXT_DIM, generator=generator)


def per_row(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


class Subject(NamedTuple):
    """The arguments of a run besides its data: a denoiser, and untrained trainables."""

    denoiser: TinyDenoiser
    lora: SelfAttentionLoRA
    tokens: list[nn.Parameter]


def fresh_subject(denoiser: type[TinyDenoiser] = TinyDenoiser, rank: int = 2) -> Subject:
    token = nn.Parameter(word_vector("thing")[None])
    model = denoiser(token)
    lora = SelfAttentionLoRA(model.layers, rank, float(rank), torch.Generator().manual_seed(11))
    return Subject(model, lora, [token])


def example(seed: int, height: int = 4, width: int = 4, caption: str = "a photo of sks teapot", mask=None) -> Example:
    generator = torch.Generator().manual_seed(seed)
    return Example(torch.randn(1, IN_CHANNELS, height, width, generator=generator), (caption,), mask)
