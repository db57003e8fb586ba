"""Models and adapters that do not fit are refused by the node, in words that name what was connected."""

import dataclasses

import pytest
import torch

from tests.host.adapters import apply, base_model, make_adapter, make_prompt, random

FLUX_FILL = {
    "image_model": "flux",
    "in_channels": 96,
    "patch_size": 2,
    "out_channels": 16,
    "vec_in_dim": 8,
    "context_in_dim": 8,
    "hidden_size": 16,
    "mlp_ratio": 1.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [2, 4, 2],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
LUMINA2 = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": 8,
    "n_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": [8, 12, 12],
    "axes_lens": [8, 8, 8],
    "ffn_dim_multiplier": 1.0,
}
SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "pos_embed_max_size": 8,
    "depth": 1,
    "adm_in_channels": 8,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 64}},
}
SVD = {
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 8,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_linear_in_transformer": True,
    "context_dim": 32,
    "adm_in_channels": 8,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
}


UNETS = {"FluxInpaint": FLUX_FILL, "SD3": SD3, "SVD_img2vid": SVD, "Lumina2": LUMINA2}
REASONS = {"FluxInpaint": "it takes reference pictures of its own", "SVD_img2vid": "it draws video"}


def model_of(family: str):
    """A real model of another family with next to nothing in it, as the host's loader would build it."""
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    unet_config = {**UNETS[family], "dtype": torch.float32}
    if family.startswith("Flux") and "txt_ids_dims" in {field.name for field in dataclasses.fields(FluxParams)}:
        unet_config["txt_ids_dims"] = []  # hosts newer than 0.3.75 ask for it
    config = getattr(comfy.supported_models, family)(unet_config)
    with torch.inference_mode():
        base = config.get_model({}, "", device=torch.device("cpu"))
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def sd15(comfy_host):
    return base_model(comfy_host, "sd15")


@pytest.mark.parametrize("family", UNETS)
def test_a_model_that_is_no_such_unet_is_refused_by_name(comfy_host, sd15, family):
    model = model_of(family)
    with pytest.raises(ValueError, match=rf"connected model is {family}\b") as refusal:
        apply(comfy_host, model, make_adapter(sd15), make_prompt())
    message = str(refusal.value)
    assert "SD1.x, SD2.x, SDXL, Z-Image, Flux.1, Flux.2 and Chroma" in message and "\n" not in message
    assert REASONS.get(family, "it is not supported") in message
    assert not model.wrappers


def test_it_is_refused_even_when_nothing_would_be_injected(comfy_host, sd15):
    with pytest.raises(ValueError, match="connected model is SD3"):
        apply(comfy_host, model_of("SD3"), make_adapter(sd15), make_prompt(), strength=0.0)


def test_a_transformer_is_told_apart_from_the_adapters_model(comfy_host, sd15):
    from tests.host.tiny_transformers import tiny_transformer

    with pytest.raises(ValueError, match="was trained for SD1.x .* connected model is Z-Image"):
        apply(comfy_host, tiny_transformer("z_image"), make_adapter(sd15), make_prompt())


@pytest.mark.parametrize("name", ["GGMLTensor", "SVDQW4A4Linear"])
def test_weights_of_another_program_are_refused_by_name(comfy_host, sd15, name):
    """Packs for GGUF and Nunchaku keep the host's network and put layers of their own into it."""
    from tests.host.tiny_transformers import tiny_transformer

    model = tiny_transformer("flux_dev")
    layer = model.model.diffusion_model.img_in
    layer.__class__ = type(name, (type(layer),), {})
    with pytest.raises(ValueError, match=rf"connected model is Flux.1 as {name}: its weights .* another program's"):
        apply(comfy_host, model, make_adapter(sd15), make_prompt())


@pytest.mark.parametrize(
    "trained, connected, words",
    [
        ("sd15", "sd2", ("SD1.x", "SD2.x")),
        ("sd2_v", "sd15_inpaint", ("SD2.x", "SD1.x")),
        ("sd15", "sdxl", ("SD1.x", "SDXL")),
        ("sdxl", "sd15", ("SDXL", "SD1.x")),
    ],
)
def test_an_adapter_for_another_architecture_is_refused_naming_both(comfy_host, trained, connected, words):
    """SD1.x and SD2.x have the same self-attention layers, yet their text is of another width."""
    adapter = make_adapter(base_model(comfy_host, trained))
    with pytest.raises(ValueError) as refusal:
        apply(comfy_host, base_model(comfy_host, connected), adapter)
    message = str(refusal.value)
    assert f"'{adapter.name}' was trained for {words[0]}" in message
    assert f"connected model is {words[1]}" in message


@pytest.mark.parametrize("trained, connected", [("sd15", "sd15_inpaint"), ("sd15_inpaint", "sd15"), ("sd2", "sd2_v")])
def test_relatives_of_the_base_model_are_accepted(comfy_host, trained, connected):
    model = base_model(comfy_host, connected)
    assert apply(comfy_host, model, make_adapter(base_model(comfy_host, trained))) is not model


def test_pruned_relatives_are_told_apart(comfy_host):
    """SSD-1B, Vega and SDXL differ in their layers alone."""
    model = base_model(comfy_host, "sdxl")
    adapter = make_adapter(model)
    layers = adapter.info.layers
    other = type(adapter.info)(**{**vars(adapter.info), "layers": layers[:-1]})
    adapter.info = other
    with pytest.raises(ValueError, match=rf"SDXL \({len(layers) - 1} self-attention layers\).*SDXL \({len(layers)}\)"):
        apply(comfy_host, model, adapter)


def test_pictures_of_another_vae_are_refused_by_number(comfy_host, sd15):
    from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage  # pyright: ignore[reportMissingImports]

    prompt = make_prompt() + ImagePrompt((ReferenceImage(random(1, 16, 8, 8)),))
    with pytest.raises(ValueError, match="Picture 2 .* 16 latent channels, but the model wants 4"):
        apply(comfy_host, sd15, prompt=prompt)


def test_an_area_that_is_not_a_number_is_refused(comfy_host, sd15):
    with pytest.raises(ValueError, match="attn_mask"):
        apply(comfy_host, sd15, attn_mask=torch.full((1, 8, 8), float("nan")))
