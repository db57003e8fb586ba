"""Small trainings through the node: their inputs and their results."""

from typing import Any, NamedTuple

import torch

SMALL = {
    "placeholder_token": "sainj",
    "class_word": "toy",
    "resolution": 64,
    "steps": 1,
    "lora_learning_rate": 1e-3,
    "token_learning_rate": 1e-3,
    "rank": 2,
    "alpha": 2.0,
    "previews": 0,
    "sample_every": 0,
    "seed": 1,
    "file_name": "test_train",
}


class Checkpoint(NamedTuple):
    model: Any
    clip: Any
    vae: Any


def pictures(count: int, height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    """A bright square on a darker, noisy background, at another position in every picture. (count, h, w, c) in 0..1"""
    generator = torch.Generator().manual_seed(3)
    images = 0.4 * torch.rand(count, height, width, channels, generator=generator)
    for number, image in enumerate(images):
        image[8 + 8 * number : 32 + 8 * number, 12:44, :2] = 0.9
    return images


def tensors_of(adapter: Any) -> dict[str, torch.Tensor]:
    return {**adapter.lora.state_dict(), **adapter.token_embedding, "text": adapter.class_conditioning.cross_attn}


def same_adapter(a: Any, b: Any) -> bool:
    """Whether two trainings have the same result."""
    ours, theirs = ({**x.lora.state_dict(), **x.token_embedding} for x in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
