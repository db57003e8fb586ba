"""Diffusion transformers and their text encoders with little in them, in the host's own classes.

ComfyUI's loaders know these architectures by their full width (Z-Image by 3840, T5-XXL by its 24 layers), so that no
small file can be one. So the classes that the loaders choose are given small numbers, and everything behind them is the
host's: its model patcher, its conditions, its sampling, its tokenizers.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

TEXT_WIDTH = 64  # of every text encoder but CLIP


class Encoders(NamedTuple):
    """Module and names of the tokenizer and of the text encoder, and sizes."""

    module: str
    tokenizer: str
    encoder: str
    options: dict[str, Any]


QWEN3 = {
    "qwen3_4b_model_config": {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
}
T5 = {"t5xxl_model_config": {"d_model": TEXT_WIDTH, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 3}}
CLIP = {"clip_l_model_config": {"num_hidden_layers": 3}}
ENCODERS: dict[str, Encoders] = {
    "z_image": Encoders("z_image", "ZImageTokenizer", "ZImageTEModel", QWEN3),
    "flux": Encoders("flux", "FluxTokenizer", "FluxClipModel", {**T5, **CLIP}),
    "chroma": Encoders("pixart_t5", "PixArtTokenizer", "PixArtT5XXL", T5),
}


def tiny_clip(kind: str) -> Any:
    """A CLIP of the host for one of `ENCODERS`, of inference tensors as the stock loader makes them."""
    import importlib

    import comfy.sd
    from comfy.supported_models_base import ClipTarget

    module = importlib.import_module(f"comfy.text_encoders.{ENCODERS[kind].module}")
    target = ClipTarget(getattr(module, ENCODERS[kind].tokenizer), getattr(module, ENCODERS[kind].encoder))
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, model_options={**ENCODERS[kind].options, "dtype": torch.float32})
        randomize(clip.cond_stage_model, seed=1)
        for tokenizer in vars(clip.tokenizer).values():
            if getattr(tokenizer, "embedding_key", None) in ("qwen3_4b", "t5xxl"):
                tokenizer.embedding_size = TEXT_WIDTH
    return clip


def randomize(module: nn.Module, seed: int) -> None:
    """Fill weights so that unit variance stays about that, and every part of the network shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            is_scale = "norm" in name and not name.endswith("bias")
            values = 1 + 0.05 * values if is_scale else 0.02 * values
        elif "embed" in name or "shared" in name:
            values = 0.5 * values
        else:
            values = values / weight.shape[1] ** 0.5
        weight.copy_(values)
