"""Small diffusion transformers and their text encoders, in the host's own classes.

ComfyUI's loaders know these architectures by their full width (Z-Image by 3840, T5-XXL by its 24 layers), so no small
file can be one. So the classes that the loaders choose get small sizes. Everything else is the host's: model patcher,
conditions, sampling and tokenizers.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

TEXT_WIDTH = 64  # of all text encoders but CLIP
POOLED_WIDTH = 768  # CLIP's

# A class name of `comfy.supported_models`, and its sizes.
NEXTDIT = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": TEXT_WIDTH,
    "n_layers": 3,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
FLUX = {
    "image_model": "flux",
    "axes_dim": [16, 24, 24],
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "qkv_bias": True,
    "patch_size": 2,
    "hidden_size": 128,
    "context_in_dim": TEXT_WIDTH,
    "vec_in_dim": POOLED_WIDTH,
    "depth": 2,
    "depth_single_blocks": 2,
    "guidance_embed": True,
}
CHROMA_ONLY = {"in_dim": 64, "out_dim": 128, "hidden_dim": 96, "n_layers": 2, "image_model": "chroma"}
FLUX2_ONLY = {
    "image_model": "flux2",
    "axes_dim": [16, 16, 16, 16],
    "theta": 2000,
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "global_modulation": True,
    "vec_in_dim": None,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "guidance_embed": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "z_image": ("ZImage", NEXTDIT),
    "flux_dev": ("Flux", FLUX),
    "flux_schnell": ("FluxSchnell", {**FLUX, "guidance_embed": False}),
    "flux2": ("Flux2", {**FLUX, **FLUX2_ONLY}),
    "chroma": (
        "Chroma",
        {k: v for k, v in FLUX.items() if k not in ("vec_in_dim", "guidance_embed")}
        | CHROMA_ONLY
        | {"in_channels": 64, "out_channels": 64},
    ),
}
TRANSFORMERS = tuple(MODELS)


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
# What is read are the layers 9, 18 and 27.
KLEIN = {"qwen3_4b_model_config": {**QWEN3["qwen3_4b_model_config"], "num_hidden_layers": 28}}
T5 = {"t5xxl_model_config": {"d_model": TEXT_WIDTH, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 3}}
CLIP = {"clip_l_model_config": {"num_hidden_layers": 3}}
ENCODERS: dict[str, Encoders] = {
    "z_image": Encoders("z_image", "ZImageTokenizer", "ZImageTEModel", QWEN3),
    "flux": Encoders("flux", "FluxTokenizer", "FluxClipModel", {**T5, **CLIP}),
    "chroma": Encoders("pixart_t5", "PixArtTokenizer", "PixArtT5XXL", T5),
    "klein": Encoders("flux", "KleinTokenizer", "klein_te", KLEIN),
}


def knows_klein() -> bool:
    """Whether the host has Flux.2 Klein's text encoder."""
    import comfy.text_encoders.flux

    return hasattr(comfy.text_encoders.flux, "KleinTokenizer")


def tiny_transformer(kind: str) -> Any:
    """A MODEL of the host for one of `MODELS`, of inference tensors as the stock loader makes them."""
    import comfy.model_management as model_management
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    name, numbers = MODELS[kind]
    if "txt_ids_dims" in FluxParams.__dataclass_fields__ and kind != "z_image":  # since 0.16
        numbers = {"vec_in_dim": None, **numbers, "txt_ids_dims": [3] if kind == "flux2" else []}
    with torch.inference_mode():
        config = getattr(comfy.supported_models, name)(dict(numbers))
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, "")
        randomize(base.diffusion_model, seed=2)
        base.eval()
        device = model_management.get_torch_device()
        return comfy.model_patcher.ModelPatcher(base, device, model_management.unet_offload_device())


def tiny_vae(channels: int = 16) -> Any:
    """A VAE of the host with a number of latent channels, in the layout of TAESD."""
    import comfy.sd

    from tests.host.tiny_checkpoints import SD15, Weights, write_vae

    weights = Weights()
    write_vae(weights, SD15)
    weights.layer("first_stage_model.taesd_encoder.14", channels, 64, 3, 3)
    weights.layer("first_stage_model.taesd_decoder.1", 64, channels, 3, 3, gain=2**0.5)
    weights["first_stage_model.vae_scale"] = torch.tensor(1.0)
    with torch.inference_mode():
        return comfy.sd.VAE(sd={name.removeprefix("first_stage_model."): w.float() for name, w in weights.items()})


def tiny_clip(kind: str) -> Any:
    """A CLIP of the host for one of `ENCODERS`, of inference tensors as the stock loader makes them."""
    import importlib

    import comfy.sd
    from comfy.supported_models_base import ClipTarget

    module = importlib.import_module(f"comfy.text_encoders.{ENCODERS[kind].module}")
    encoder = getattr(module, ENCODERS[kind].encoder)
    encoder = encoder if isinstance(encoder, type) else encoder()  # or a function that makes a class
    target = ClipTarget(getattr(module, ENCODERS[kind].tokenizer), encoder)
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, model_options={**ENCODERS[kind].options, "dtype": torch.float32})
        randomize(clip.cond_stage_model, seed=1)
        for tokenizer in vars(clip.tokenizer).values():
            if getattr(tokenizer, "embedding_key", None) in ("qwen3_4b", "t5xxl"):
                tokenizer.embedding_size = TEXT_WIDTH
    return clip


def randomize(module: nn.Module, seed: int) -> None:
    """Fill weights so that the variance stays about 1, and every part of the network has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            is_scale = "norm" in name and not name.endswith("bias")
            values = 1 + 0.05 * values if is_scale else 0.02 * values
        elif "embed" in name or "shared" in name:
            values = 0.5 * values
        else:
            values = values / weight.shape[1] ** 0.5 * (0.3 if "adaLN" in name else 1.0)
        weight.copy_(values)
