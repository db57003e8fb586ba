"""What the training node says to input that cannot work: what is wrong, where, and what to do instead."""

import copy
from typing import Any

import pytest
import torch

SMALL = {
    "resolution": 64,
    "steps": 1,
    "rank": 2,
    "alpha": 2.0,
    "previews": 0,
    "sample_every": 0,
    "file_name": "test_bad_input",
}
NODE = "Train SA-Inject Adapter"


@pytest.fixture(scope="module")
def train(comfy_host, pack_nodes, sd15):
    model, clip, vae = sd15

    def run(**inputs) -> tuple:
        inputs = {"model": model, "clip": clip, "vae": vae, "images": pictures(2), **SMALL, **inputs}
        return comfy_host.execute("TrainSAInjectAdapter", **inputs)

    return run


@pytest.fixture
def refused(train, comfy_host):
    """`refused(images=...)`: what the node says. No file is left."""

    def run(**inputs) -> str:
        with pytest.raises(ValueError) as failure:
            train(**inputs)
        assert not list((comfy_host.base / "models/sa_inject").rglob("test_bad_input*"))
        return str(failure.value)

    return run


def pictures(count: int, height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(count))


# --- images -----------------------------------------------------------------------------------------------------------


def test_no_images(refused):
    for images in ([], [pictures(0)], pictures(0)):
        assert refused(images=images) == f"{NODE}: there are no images. Connect at least one picture of the subject."


def test_one_image_is_allowed(train):
    adapter, *_ = train(images=pictures(1), file_name="one image")
    assert adapter.info.training["pictures"] == 1


def test_image_without_pixels(refused):
    for height, width in ((0, 64), (64, 0), (0, 0)):
        words = refused(images=[pictures(1), pictures(1, height, width)])
        assert words == f"{NODE}: image 2 has no pixels ({width}x{height}). Remove it."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_image_with_values_that_are_no_numbers(refused, value):
    images = pictures(3)
    images[2, 5, 5, 1] = value
    words = refused(images=images)
    assert f"{NODE}: image 3 holds NaN or infinite values" in words and "Remove it or save it again" in words


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images_are_allowed(train, channels):
    train(images=[pictures(1, channels=channels), pictures(1)], file_name="channels")


def test_image_of_another_number_of_channels(refused):
    for channels in (2, 5):
        words = refused(images=[pictures(1, channels=channels)])
        assert words == f"{NODE}: image 1 has {channels} channels; a picture has 1 (grey), 3 (RGB) or 4 (RGBA)."


def test_image_that_is_no_batch(refused):
    words = refused(images=pictures(1)[0])
    assert "expected images of shape (batch, height, width, channels), got (64, 64, 3)" in words


# --- masks and captions -----------------------------------------------------------------------------------------------


def test_mask_of_another_size(refused):
    words = refused(images=[pictures(1), pictures(1, 32, 128)], masks=[torch.ones(1, 64, 64), torch.ones(1, 48, 80)])
    assert words == f"{NODE}: mask 2 is 80x48 pixels, but image 2 is 128x32. Resize the mask to the image."


def test_another_number_of_masks(refused):
    words = refused(images=pictures(2), masks=torch.ones(3, 64, 64))
    assert words == f"{NODE}: 3 masks came with 2 images. Connect one for each image, or one for all."


def test_mask_with_values_that_are_no_numbers(refused):
    masks = torch.ones(2, 64, 64)
    masks[1, 0, 0] = float("nan")
    assert f"{NODE}: mask 2 holds NaN or infinite values" in refused(masks=masks)


def test_another_number_of_captions(refused):
    for count in (2, 4):
        words = refused(images=pictures(3), captions=["a photo of sainj"] * count)
        assert words == f"{count} captions came with 3 images. Connect one caption for each image, or one for all."


def test_placeholder_in_none_of_the_captions(refused):
    for captions in (["a photo of a toy"], ["a photo of sainjs", "mysainj"]):
        words = refused(captions=captions)
        assert "'sainj' is in none of the captions" in words and "Write it where the subject is named" in words


def test_placeholder_in_one_of_the_captions_is_enough(train):
    train(captions=["a photo of SAINJ, red", "a photo of a toy"], file_name="captions")


# --- words ------------------------------------------------------------------------------------------------------------


def test_placeholder_that_is_a_word_of_the_vocabulary(refused):
    for word in ("dog", "sks", "Dog", " dog ", "!"):
        words = refused(placeholder_token=word)
        assert f"'{word.strip()}' is an ordinary word" in words and "clip_l" in words
        assert f"Use a made-up word such as '{word.strip()}xyz'" in words


def test_placeholder_that_prompts_could_not_hold(refused):
    for word in ("", "  ", "my dog", "a:b", "(sainj)", "sainj:1.3", "a,b", "a\nb", "a\\b", "embedding"):
        words = refused(placeholder_token=word)
        assert f"The placeholder token is '{word.strip()}'" in words and "such as 'sainj'" in words


def test_empty_class_word(refused):
    for word in ("", "   "):
        words = refused(class_word=word)
        assert words == "The class word is empty. Say what the subject is in a word, such as 'dog' or 'toy'."


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_counts_below_one(refused, pack_nodes):
    for name in ("steps", "batch_size", "gradient_accumulation", "rank"):
        for value in (0, -1):
            assert refused(**{name: value}) == f"{name} is {value}; it must be at least 1."
        assert pack_nodes["TrainSAInjectAdapter"].INPUT_TYPES()["required"][name][1]["min"] == 1


def test_both_learning_rates_zero(refused):
    words = refused(lora_learning_rate=0.0, token_learning_rate=0.0)
    assert words == "Both learning rates are 0, so nothing would be learned. Raise one of them."


def test_negative_learning_rate(refused):
    words = refused(lora_learning_rate=-1e-4)
    assert "lora_learning_rate is -0.0001" in words and "not negative" in words


# --- models -----------------------------------------------------------------------------------------------------------


class OtherVae:
    """Its latents have another number of channels, or of dimensions."""

    def __init__(self, *shape: int):
        self.shape = shape

    def encode(self, pixels: Any) -> torch.Tensor:
        return torch.zeros(self.shape)


@pytest.mark.parametrize("shape, found", [((1, 16, 8, 8), "16 channels and 2"), ((1, 4, 1, 8, 8), "4 channels and 3")])
def test_vae_of_another_latent_size(refused, shape, found):
    words = refused(vae=OtherVae(*shape))
    assert f"The connected VAE makes latents of {found} dimensions, but the model wants 4 channels and 2." in words
    assert "Connect the VAE of the same base model" in words


def test_model_that_is_no_such_unet(refused, sd15):
    class Mochi(torch.nn.Module):
        diffusion_model = torch.nn.Linear(1, 1)

    other = copy.copy(sd15[0])
    other.model = Mochi()
    words = refused(model=other)
    assert "SD1.x, SD2.x, SDXL" in words and "the connected model is Mochi" in words


def test_training_that_diverges_says_so_and_leaves_no_file(train, comfy_host):
    images = pictures(2)
    with pytest.raises(RuntimeError, match=r"(loss|gradient) became .* at step \d+\. Lower the learning rates"):
        rates = {"lora_learning_rate": 1.0, "token_learning_rate": 1.0, "alpha": 1e20}
        train(images=images, steps=8, file_name="diverges", **rates)
    assert not list((comfy_host.base / "models/sa_inject").glob("diverges*.safetensors"))


@pytest.mark.parametrize("part", ["clip", "vae"])
def test_checkpoint_without_a_part(refused, part):
    """What the host's loader hands over when the file has none."""
    words = f"The checkpoint has no {part.upper()}. Connect one of the same base model to '{part}'."
    assert refused(**{part: None}) == words
