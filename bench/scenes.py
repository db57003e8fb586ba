"""The models that are measured, and the inputs that a graph would supply.

Import only after the host has started.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.sd
import folder_paths
import torch
from torch import Tensor

from sa_inject.core.adapter import Adapter, AdapterInfo, ReferenceMode
from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage, TextConditioning
from sa_inject.core.lora import SelfAttentionLoRA
from sa_inject.nodes.host.networks.unet import UnetDescription, describe
from tests.host import full_size

from .host import demo_checkpoint

RANK = 16
TEXT_TOKENS = 77
POOLED = 1280
LORA_B_SIZE = 0.02  # trained adapters are not zero
DEMO_SIDE = 128


def side_of(geometry: str) -> int:
    return DEMO_SIDE if geometry == "demo" else full_size.GEOMETRIES[geometry].side


def load_model(geometry: str, dtype: torch.dtype) -> Any:
    """The ModelPatcher of a geometry. The demo's weights have the type that the host chooses."""
    if geometry == "demo":
        with torch.inference_mode():
            options = {"dtype": dtype} if dtype != torch.float32 else {}
            return comfy.sd.load_checkpoint_guess_config(
                str(demo_checkpoint()), output_vae=False, output_clip=False, model_options=options
            )[0]
    return full_size.random_model(full_size.GEOMETRIES[geometry], dtype)


def load_text_and_vae(host: Any, geometry: str) -> tuple[Any, Any]:
    """Text encoders of the geometry's own size, because training goes through them, and a small VAE."""
    if geometry == "demo":
        with torch.inference_mode():
            embeddings = folder_paths.get_folder_paths("embeddings")
            path = str(demo_checkpoint())
            return comfy.sd.load_checkpoint_guess_config(path, embedding_directory=embeddings, output_model=False)[1:3]
    found = full_size.GEOMETRIES[geometry]
    return host.load_checkpoint(found.checkpoint, text_layers=found.text_layers)[1:]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quarter_mask(side: int) -> Tensor:
    """White in the middle, over a quarter of the picture. (side, side)"""
    mask = torch.zeros(side, side)
    mask[side // 4 : side - side // 4, side // 4 : side - side // 4] = 1
    return mask


@dataclass(frozen=True)
class Scene:
    """One loaded model, and inputs of its shapes."""

    geometry: str
    model: Any
    side: int

    @cached_property
    def description(self) -> UnetDescription:
        return describe(self.model)

    @property
    def unet_config(self) -> dict[str, Any]:
        return self.model.model.model_config.unet_config

    @property
    def latent_side(self) -> int:
        return self.side // 8

    def text(self, seed: int) -> TextConditioning:
        pooled = random(1, POOLED, seed=seed + 1) if self.unet_config.get("adm_in_channels") else None
        return TextConditioning(random(1, TEXT_TOKENS, self.unet_config["context_dim"], seed=seed), pooled)

    def conditioning(self, seed: int) -> list:
        """The output of a text encode node."""
        text = self.text(seed)
        return [[text.cross_attn, {} if text.pooled is None else {"pooled_output": text.pooled}]]

    def latent(self, seed: int) -> Tensor:
        return random(1, 4, self.latent_side, self.latent_side, seed=seed)

    def prompt(self, references: int, masked: bool) -> ImagePrompt:
        mask = quarter_mask(self.side) if masked else None
        return ImagePrompt(tuple(ReferenceImage(self.latent(100 + index), mask) for index in range(references)))

    def adapter(self, mode: ReferenceMode) -> Adapter:
        return untrained_adapter(self.description, self.text(seed=7), mode)


def untrained_adapter(description: UnetDescription, text: TextConditioning, mode: ReferenceMode) -> Adapter:
    """An adapter of the usual size and cost, with random values."""
    architecture, layers = description
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        lora = SelfAttentionLoRA(layers, rank=RANK, alpha=float(RANK), generator=generator)
        values = {
            name: torch.randn(tensor.shape, generator=generator) * LORA_B_SIZE if ".lora_B." in name else tensor
            for name, tensor in lora.state_dict().items()
        }
        lora.load_state_dict(values)
        for parameter in lora.parameters():
            parameter.requires_grad_(False)
    info = AdapterInfo(
        architecture=architecture,
        layers=layers,
        rank=RANK,
        alpha=float(RANK),
        reference_mode=mode,
        placeholder_token="sainj",
        class_word="toy",
    )
    tokens = {"clip_l": random(1, 768, seed=8)}
    if text.pooled is not None:
        tokens["clip_g"] = random(1, POOLED, seed=9)
    return Adapter(name=f"bench-{mode}", info=info, lora=lora, token_embedding=tokens, class_conditioning=text)
