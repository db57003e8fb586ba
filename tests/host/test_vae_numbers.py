"""A VAE that overflows in half precision: named, with the cure, where pictures are encoded and decoded."""

import copy
import logging

import pytest
import torch

SMALL = {"resolution": 64, "steps": 1, "rank": 2, "alpha": 2.0, "file_name": "test_vae_numbers"}
CURE = "--fp32-vae"


def overflowing(vae, part: str):
    """The same VAE with larger weights in its first layers, which float16 cannot follow, as SDXL's."""
    broken = copy.copy(vae)
    broken.first_stage_model = copy.deepcopy(vae.first_stage_model)
    broken.patcher = copy.copy(vae.patcher)
    broken.patcher.model = broken.first_stage_model
    with torch.no_grad():
        for weight in getattr(broken.first_stage_model, part).parameters():
            weight.mul_(1e3)
    broken.first_stage_model.half()
    broken.vae_dtype = torch.float16
    return broken


@pytest.fixture(scope="module")
def bad_encoder(sd15):
    return overflowing(sd15[2], "taesd_encoder")


def refused(comfy_host, node: str, **inputs) -> str:
    with pytest.raises(ValueError) as failure:
        comfy_host.execute(node, **inputs)
    return str(failure.value)


@pytest.mark.parametrize("node", ["EncodeImagePrompt", "TrainSAInjectAdapter"])
def test_vae_that_gives_no_numbers_is_named_with_the_cure(comfy_host, pack_nodes, sd15, bad_encoder, node):
    model, clip, _ = sd15
    inputs = {"images": torch.rand(2, 64, 64, 3), "vae": bad_encoder, "resolution": 64}
    if node == "TrainSAInjectAdapter":
        inputs = {**inputs, "model": model, "clip": clip, "previews": 0, "sample_every": 0, **SMALL}
    words = refused(comfy_host, node, **inputs)
    assert "The connected VAE (TAESD in float16) gave NaN or infinite values" in words
    assert CURE in words and "--bf16-vae" in words and "fixed for float16" in words
    assert not list((comfy_host.base / "models/sa_inject").rglob("test_vae_numbers*"))


def test_previews_of_a_vae_that_gives_no_numbers_are_black_and_told(comfy_host, pack_nodes, sd15, monkeypatch, caplog):
    monkeypatch.setattr("sa_inject.nodes.host.drawing.preview.STEPS", 1)
    model, clip, vae = sd15
    inputs = {
        "images": torch.rand(2, 64, 64, 3),
        "vae": overflowing(vae, "taesd_decoder"),
        "previews": 1,
        "sample_every": 0,
        **SMALL,
    }
    with caplog.at_level(logging.WARNING):
        *_, previews, _ = comfy_host.execute("TrainSAInjectAdapter", model=model, clip=clip, **inputs)
    assert previews.isfinite().all() and not previews.any()
    assert "TAESD in float16" in caplog.text and CURE in caplog.text
    assert list((comfy_host.base / "models/sa_inject").rglob("test_vae_numbers*"))
