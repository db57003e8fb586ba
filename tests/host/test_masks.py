"""Masks as people have them: the host's placeholder, inverted, empty, tiny, or cut away with the picture's edge."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

SMALL = {
    "resolution": 64,
    "steps": 1,
    "rank": 2,
    "alpha": 2.0,
    "previews": 0,
    "sample_every": 0,
    "file_name": "test_masks",
}
TRAIN, ENCODE = "Train SA-Inject Adapter", "Encode Image Prompt"


@pytest.fixture(scope="module")
def encode(comfy_host, pack_nodes, sd15):
    def run(images, mask, **inputs):
        inputs = {"images": images, "vae": sd15[2], "resolution": 64, "mask": mask, **inputs}
        return comfy_host.execute("EncodeImagePrompt", **inputs)[0].pictures

    return run


@pytest.fixture(scope="module")
def train(comfy_host, pack_nodes, sd15):
    model, clip, vae = sd15

    def run(images, masks, **inputs):
        inputs = {"model": model, "clip": clip, "vae": vae, "images": images, "masks": masks, **SMALL, **inputs}
        return comfy_host.execute("TrainSAInjectAdapter", **inputs)

    return run


@pytest.fixture(params=[TRAIN, ENCODE])
def node(request, train, encode):
    """`node.run(images, masks)` of both nodes, and the name that each gives itself."""
    return SimpleNamespace(run=train if request.param == TRAIN else encode, name=request.param)


def pictures(count: int, height: int = 96, width: int = 96) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count))


def spot(size: int, height: int = 96, width: int = 96) -> torch.Tensor:
    """White in a square of `size` pixels whose corner lies on a cell's."""
    mask = torch.zeros(1, height, width)
    mask[:, 48 : 48 + size, 48 : 48 + size] = 1
    return mask


def load_image(comfy_host, name: str, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    picture.save(comfy_host.base / "input" / name)
    return comfy_host.execute("LoadImage", image=name)


def cut_out(size: int = 96) -> Image.Image:
    """Opaque in the left half, where the subject is."""
    pixels = np.full((size, size, 4), 200, np.uint8)
    pixels[..., 3] = 0
    pixels[:, : size // 2, 3] = 255
    return Image.fromarray(pixels, "RGBA")


# --- masks that mean "no mask" ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverted", [False, True])
def test_mask_that_load_image_gives_for_an_opaque_picture_is_no_mask(comfy_host, node, inverted, caplog):
    image, mask = load_image(comfy_host, "opaque.png", Image.new("RGB", (96, 80), "red"))
    assert mask.shape == (1, 64, 64) and not mask.any()
    if inverted:
        (mask,) = comfy_host.execute("InvertMask", mask=mask)
    with caplog.at_level(logging.INFO):
        node.run(image, mask)
    assert f"{node.name}: LoadImage found no transparency" in caplog.text and "image 1" in caplog.text


def test_placeholder_among_masks_of_a_list_leaves_its_picture_whole(comfy_host, encode):
    opaque, placeholder_token = load_image(comfy_host, "opaque.png", Image.new("RGB", (96, 80), "red"))
    clear, mask = load_image(comfy_host, "cut-out.png", cut_out())
    whole, masked = encode([opaque, clear], [placeholder_token, 1 - mask])
    assert whole.mask is None
    assert masked.mask[:, :30].min() > 0.9 and masked.mask[:, 34:].max() < 0.1


def test_white_mask_is_no_mask(encode):
    (picture,) = encode(pictures(1), torch.ones(1, 96, 96))
    assert picture.mask is None


def test_patterned_64_pixel_mask_is_refused_with_where_it_may_come_from(encode):
    with pytest.raises(ValueError, match=r"mask 1 is 64x64 pixels, but image 1 is 96x96.*LoadImage gives 64x64"):
        encode(pictures(1), spot(16, 64, 64))


# --- masks that leave nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 2 / 255])
def test_mask_that_leaves_nothing_is_refused_with_the_likely_causes(node, value):
    masks = torch.ones(2, 96, 96)
    masks[1] = value
    with pytest.raises(ValueError) as failure:
        node.run(pictures(2), masks)
    words = str(failure.value)
    assert words.startswith(f"{node.name}: mask 2 leaves {'nothing' if value == 0 else 'next to nothing'}")
    assert "of image 2" in words and "InvertMask" in words and "without transparency" in words


def test_placeholder_that_was_resized_to_the_picture_is_refused(comfy_host, node):
    image, mask = load_image(comfy_host, "opaque.png", Image.new("RGB", (96, 80), "red"))
    mask = torch.nn.functional.interpolate(mask[None], (80, 96))[0]
    with pytest.raises(ValueError, match="mask 1 leaves nothing of image 1.*without transparency: disconnect it"):
        node.run(image, mask)


@pytest.mark.parametrize("size", [1, 2])
def test_mask_that_keeps_next_to_nothing_is_refused(node, size):
    with pytest.raises(ValueError, match=r"mask 1 leaves next to nothing \(0\.0\d%\) of image 1"):
        node.run(pictures(1), spot(size))


def test_small_subject_and_grey_mask_are_kept(encode):
    (small,) = encode(pictures(1), spot(8))
    (grey,) = encode(pictures(1), torch.full((1, 96, 96), 0.3))
    assert small.mask.max() > 0.5 and grey.mask.min() > 0.2


def test_subject_that_is_cut_off_with_the_edge_is_refused(encode):
    mask = torch.zeros(1, 64, 256)
    mask[:, :, :64] = 1
    with pytest.raises(ValueError, match="mask 1 leaves nothing of image 1 when it is resized and cut to 64x64 pixels"):
        encode(pictures(1, 64, 256), mask)
    assert encode(pictures(1, 64, 256), mask, fit="pad")[0].mask.any()


def test_subject_that_vanishes_at_the_training_size_is_refused(train):
    mask = torch.zeros(1, 1024, 1024)
    mask[:, 512:528, 512:528] = 1  # one pixel at 64
    with pytest.raises(ValueError, match=r"mask 1 leaves next to nothing .* when it is resized and cut to 64x64"):
        train(torch.rand(1, 1024, 1024, 3), mask)


def test_preview_shows_the_subject_that_lies_outside_of_the_square(train, monkeypatch):
    monkeypatch.setattr("sa_inject.nodes.host.drawing.preview.STEPS", 1)
    mask = torch.zeros(1, 128, 256)
    mask[:, :, :48] = 1  # outside of the square in the middle, inside of the training size
    _, _, _, previews, *_ = train(pictures(1, 128, 256), mask, previews=1, resolution=128, file_name="test_masks wide")
    assert previews.shape == (1, 128, 128, 3) and previews.isfinite().all()


def test_masks_of_load_image_are_the_other_way_round(comfy_host, encode):
    """Which is why the help pages say InvertMask."""
    image, mask = load_image(comfy_host, "cut-out.png", cut_out())
    (inverted,) = comfy_host.execute("InvertMask", mask=mask)
    (picture,) = encode(image, inverted)
    assert picture.mask[:, :30].min() > 0.9 and picture.mask[:, 34:].max() < 0.1
