"""The tiny NextDiT's text encoder: Z-Image's tokenizer, and a small, random, frozen Qwen3 in the host's class.

Its weights depend on a seed, like those of the UNet's text encoder (`text_encoder.py`), so there is no file. A token's
vector hardly depends on the others. The vectors have about the norm of real ones.
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .host import use_host

use_host("cuda" if torch.cuda.is_available() else "cpu")
import comfy.sd  # noqa: E402
from comfy.supported_models_base import ClipTarget  # noqa: E402
from comfy.text_encoders import z_image  # noqa: E402

SEED: int = 20_270
WIDTH: int = 256
CONFIG: dict = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,  # the output is that of the last but one layer
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKEN_STD: float = 0.03
BRANCH_STD: float = 0.01  # scale of a residual branch, before attention averages it
KEY: str = "qwen3_4b"
MULTIPLE: int = 32  # Z-Image pads texts and pictures to a multiple of this number of tokens


def new_text_encoder(device: str = "cpu", seed: int = SEED) -> comfy.sd.CLIP:
    """A CLIP of the host. Its token embeddings have their own width."""
    options = {f"{KEY}_model_config": CONFIG, "dtype": torch.float32, "load_device": torch.device(device)}
    clip = comfy.sd.CLIP(ClipTarget(z_image.ZImageTokenizer, z_image.ZImageTEModel), model_options=options)
    with torch.no_grad():
        for name, weight in clip.cond_stage_model.named_parameters():
            weight.copy_(_drawn(name, tuple(weight.shape), seed))
    clip.tokenizer.qwen3_4b.embedding_size = WIDTH
    return clip


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A random tensor. It depends on the tensor's name and the seed only."""
    if len(shape) < 2:
        return torch.ones(shape) if "norm" in name else torch.zeros(shape)
    std = TOKEN_STD if "embed" in name else shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std *= BRANCH_STD
    values = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(shape)
    return torch.from_numpy((std * values).astype(np.float16)).float()


class Texts(NamedTuple):
    """Captions of any length as one batch."""

    vectors: Tensor  # (b, n, width), n a multiple of the padding
    lengths: Tensor  # (b,) valid tokens of each caption

    @classmethod
    def of(cls, vectors: list[Tensor], multiple: int) -> "Texts":
        lengths = [len(own) for own in vectors]
        n = -(-max(lengths) // multiple) * multiple
        filled = [pad(own, (0, 0, 0, n - len(own))) for own in vectors]
        return cls(torch.stack(filled), torch.tensor(lengths, device=vectors[0].device))

    def repeated(self, times: int) -> "Texts":
        return Texts(self.vectors.repeat(times, 1, 1), self.lengths.repeat(times))

    def joined(self, other: "Texts") -> "Texts":
        n = max(self.vectors.shape[1], other.vectors.shape[1])
        filled = [pad(texts.vectors, (0, 0, 0, n - texts.vectors.shape[1])) for texts in (self, other)]
        return Texts(torch.cat(filled), torch.cat([self.lengths, other.lengths]))


class CaptionEncoder:
    """Encodes captions for the network, with a cache."""

    def __init__(self, device: str = "cpu", seed: int = SEED):
        self._device = device
        self._clip = new_text_encoder(device, seed)
        self._remembered: dict[str, Tensor] = {}

    def forget(self) -> None:
        self._remembered.clear()

    @torch.no_grad()
    def __call__(self, captions: list[str], multiple: int = MULTIPLE) -> Texts:
        for text in dict.fromkeys(captions):
            if text not in self._remembered:
                encoded = self._clip.encode_from_tokens(self._clip.tokenize(text))  # (1, n, width)
                self._remembered[text] = encoded[0].float().to(self._device)
        return Texts.of([self._remembered[text] for text in captions], multiple)
