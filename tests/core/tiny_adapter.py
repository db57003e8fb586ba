"""Adapters for the tiny UNet with seeded random numbers, and the UNet with the adapter merged in."""

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sa_inject.core.adapter import Adapter, AdapterInfo
from sa_inject.core.image_prompt import TextConditioning
from sa_inject.core.layers import self_attention_layers
from sa_inject.core.lora import KEY_PREFIX, SelfAttentionLoRA
from tests.tiny_unet import CONTEXT_DIM, TinyUNet

RANK, ALPHA = 3, 6.0


def random_lora(unet: nn.Module, seed: int = 0, rank: int = RANK, alpha: float = ALPHA) -> SelfAttentionLoRA:
    """A LoRA as after a training: `lora_B` is not zero, and its effect on every projection is large."""
    generator = torch.Generator().manual_seed(seed)
    lora = SelfAttentionLoRA(self_attention_layers(unet), rank, alpha, generator)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=generator)
    return lora


def merged(unet: nn.Module, lora: SelfAttentionLoRA) -> nn.Module:
    """A deep copy with the weights W + alpha/r B A, so its projections are those of the trainable copy."""
    unet = copy.deepcopy(unet)
    tensors = lora.state_dict()
    with torch.no_grad():
        for path in lora_paths(tensors):
            a, b = (tensors[f"{KEY_PREFIX}{path}.{matrix}.weight"] for matrix in ("lora_A", "lora_B"))
            unet.get_submodule(path).weight += lora.alpha / lora.rank * b @ a
    return unet


def lora_paths(tensors: dict[str, Tensor]) -> list[str]:
    """`base_model.model.middle_block.1....to_k.lora_A.weight` -> `middle_block.1....to_k`, each once"""
    return [key.removeprefix(KEY_PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]


def random_adapter(name: str = "teapot", pooled: bool = False) -> Adapter:
    unet = TinyUNet()
    generator = torch.Generator().manual_seed(7)
    return Adapter(
        name=name,
        info=AdapterInfo(
            architecture="SD1.x",
            layers=self_attention_layers(unet),
            rank=RANK,
            alpha=ALPHA,
            reference_mode="noised",
            placeholder_token="sks",
            class_word="teapot",
            training={"seed": 5, "steps": 400, "lora_learning_rate": 1e-4, "captions": ["a photo of sks teapot"]},
        ),
        lora=random_lora(unet),
        token_embedding={
            "clip_l": torch.randn(2, 8, generator=generator),
            "clip_g": torch.randn(1, 12, generator=generator),
        },
        class_conditioning=TextConditioning(
            torch.randn(1, 5, CONTEXT_DIM, generator=generator),
            torch.randn(1, 6, generator=generator) if pooled else None,
        ),
    )


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an adapter file, read without the pack."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
