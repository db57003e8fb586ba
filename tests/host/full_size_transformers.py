"""Sizes of full-size diffusion transformers, as ComfyUI's loader reads them from the shapes of real files."""

from typing import Any

Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "qk_norm": True,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
FLUX_1 = {
    "image_model": "flux",
    "axes_dim": [16, 56, 56],
    "num_heads": 24,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "qkv_bias": True,
    "patch_size": 2,
    "hidden_size": 3072,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "depth": 19,
    "depth_single_blocks": 38,
    "guidance_embed": True,
}
# By architecture: the host's class, its sizes, and its number of attention layers.
FULL_SIZE: dict[str, tuple[str, dict[str, Any], int]] = {
    "Z-Image": ("ZImage", Z_IMAGE, 32),
    "Flux.1": ("Flux", FLUX_1, 57),
}


def on_meta(name: str) -> Any:
    """A model without weights, in an object with the attribute `model` of a patcher."""
    from types import SimpleNamespace

    import comfy.supported_models
    import torch
    from comfy.ldm.flux.model import FluxParams

    config, numbers, _ = FULL_SIZE[name]
    if config == "Flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__:  # since 0.16
        numbers = {**numbers, "txt_ids_dims": []}
    built = getattr(comfy.supported_models, config)(dict(numbers))
    built.set_inference_dtype(torch.bfloat16, None)
    return SimpleNamespace(model=built.get_model({}, "", device=torch.device("meta")))
