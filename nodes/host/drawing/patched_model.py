"""The injection in any supported kind of network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..networks.registry import is_transformer
from .patch import SelfAttentionInjection, patch_self_attention
from .sampling_run import Injection
from .transformer import TransformerInjection

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def patch_model(model: ModelPatcher, injection: Injection) -> ModelPatcher:
    """Return a clone of the model with this injection added. Earlier injections stay, and all are summed."""
    kind = TransformerInjection if is_transformer(model.model.diffusion_model) else SelfAttentionInjection
    return patch_self_attention(model, injection, kind)
