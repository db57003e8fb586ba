"""A placeholder token in the host's text encoders, without a training: its vectors, and the encoded prompts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.host.adapters import random

PLACEHOLDER = "sainj"
WIDTHS = {"clip_l": 768, "clip_g": 1280, "clip_h": 1024}

Encode = Callable[..., tuple[Tensor, Tensor]]


def vectors(*encoders: str, seed: int = 0, count: int = 1) -> dict[str, Tensor]:
    """Random vectors with the size of real token embeddings."""
    return {name: 0.02 * random(count, WIDTHS[name], seed=seed) for name in encoders or ("clip_l",)}


def with_token(clip: Any, tokens: dict[str, Tensor], placeholder_token: str = PLACEHOLDER) -> Any:
    from sa_inject.nodes.host.text import clip_with_token

    return clip_with_token(clip, placeholder_token, tokens)


def encoder_of_prompts(host: Any) -> Encode:
    """`encode(clip, text)` through the stock CLIPTextEncode. -> (1, tokens, width), (1, width)"""

    def encode(clip: Any, text: str, node: str = "CLIPTextEncode", **inputs) -> tuple[Tensor, Tensor]:
        texts = inputs or {"text": text}
        ((cond, options),) = host.execute(node, clip=clip, **texts)[0]
        return cond, options["pooled_output"]

    return encode


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def encoded(host: Any, clip: Any, text: str) -> Tensor:
    """(1, tokens, width) of the stock node."""
    return host.execute("CLIPTextEncode", clip=clip, text=text)[0][0][0]
