"""Drawing and training keep the same tokens of a picture, for every kind of mask."""

import pytest
import torch

from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage  # pyright: ignore[reportMissingImports]
from tests.host.adapters import apply, load, make_adapter, random, relative_error
from tests.host.test_reference_pass import call_once


def spot(value: float) -> torch.Tensor:
    mask = torch.zeros(64, 64)
    mask[40:43, 20:23] = value
    return mask


MASKS = {
    "faint": torch.full((64, 64), 0.3),
    "faint, of an odd size": torch.full((61, 37), 0.3),
    "a small spot": spot(1.0),
    "a small faint spot": spot(0.2),
    "two equal spots": torch.maximum(spot(1.0), spot(1.0).flip(0, 1)),
    "half": torch.cat([torch.zeros(64, 32), torch.ones(64, 32)], 1),
    "noise": random(50, 50).sigmoid(),
    "white": torch.ones(3, 3),
    "black": torch.zeros(64, 64),
}


@pytest.mark.parametrize("name", MASKS)
@torch.inference_mode()
def test_training_and_drawing_keep_the_same_tokens(comfy_host, model, name):
    from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser  # pyright: ignore[reportMissingImports]

    adapter, mask = make_adapter(model), MASKS[name]
    picture = ReferenceImage(random(1, 4, 8, 8), mask=mask)
    drawn = call_once(load(apply(comfy_host, model, adapter, ImagePrompt((picture,)))))
    base, sampling = model.model, model.get_model_object("model_sampling")
    denoiser = ComfyDenoiser(base, sampling, None, adapter.info.layers, model.load_device, torch.float32)
    latent = base.process_latent_in(picture.latent).repeat(2, 1, 1, 1)
    text = type(adapter.class_conditioning)(adapter.class_conditioning.cross_attn.repeat(2, 1, 1))
    masks = torch.stack([torch.ones_like(mask), mask])  # each row by itself
    trained = denoiser.read_reference(latent, None, text, masks, adapter.lora.deltas(model.load_device, torch.float32))
    for key, (k, v) in drawn.items():
        reference = trained[key]
        kept = reference.key_mask[1]
        assert k.shape[1] == int(kept.sum()) >= 1
        assert relative_error(reference.kv.k[1, kept], k[0]) < 1e-5
        assert relative_error(reference.kv.v[1, kept], v[0]) < 1e-5
        assert reference.key_mask[0].all()
