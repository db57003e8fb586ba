"""What a training learns from: the same picture under several masks or captions, or saved twice."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

CAPTION = ("a sainj toy",)


@pytest.fixture(scope="module")
def learned_from(load_checkpoint):
    """`learned_from(pictures, masks)`: the training set of a real model and VAE."""
    model, _, vae = load_checkpoint("sd15")

    from sa_inject.nodes.host.learning.training_set import Subject, training_set

    def build(pictures, masks, captions=None, seed=0):
        subject = Subject(pictures, masks, None, "sainj", "toy", 64)
        with torch.inference_mode():
            return training_set(model, vae, subject, captions or [CAPTION] * len(pictures), seed)

    return build


def picture(seed: int, side: int = 64) -> torch.Tensor:
    """Smooth colours, as in a photo."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def half(left: bool) -> torch.Tensor:
    mask = torch.zeros(64, 64)
    mask[:, slice(0, 32) if left else slice(32, 64)] = 1
    return mask


def as_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    pixels = (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None].float() / 255


def references(data, count: int = 200) -> set[tuple[int, int]]:
    """Which example was the image prompt of which."""
    at = {id(example): index for index, example in enumerate([*data.examples, *data.views])}
    stream = data.pairs(0.0, torch.Generator().manual_seed(0))
    return {(at[id(pair.target)], at[id(pair.reference)]) for pair, _ in zip(stream, range(count), strict=False)}


@pytest.mark.parametrize(
    "height, width, size",
    [(96, 96, (64, 64)), (64, 256, (64, 128)), (300, 75, (128, 64)), (10, 1000, (64, 640)), (1000, 10, (640, 64))],
)
def test_picture_is_trained_in_its_own_aspect(comfy_host, height, width, size):
    from sa_inject.nodes.host.images import bucket_size

    assert bucket_size(height, width, 64) == size


def test_one_picture_under_two_masks_stays_and_is_not_its_own_image_prompt(learned_from, caplog):
    with caplog.at_level(logging.INFO):
        data = learned_from([picture(1), picture(1), picture(2)], [half(True), half(False), None])
    assert len(data.examples) == 3 and not data.views
    assert not torch.equal(data.examples[0].mask, data.examples[1].mask)
    assert references(data) == {(0, 2), (1, 2), (2, 0), (2, 1)}
    assert "1 pictures show the same as another one" in caplog.text and "image prompt" in caplog.text


def test_one_picture_under_two_masks_learns_from_views_of_both(learned_from):
    data = learned_from([picture(1), picture(1)], [half(True), half(False)])
    assert len(data.examples) == 2 and len(data.views) == 16
    assert {target for target, _ in references(data)} == {0, 1}
    assert all(reference >= 2 for _, reference in references(data))


def test_masked_and_unmasked_copies_both_stay(learned_from):
    data = learned_from([picture(1), picture(1), picture(2)], [half(True), None, None])
    assert [example.mask is None for example in data.examples] == [False, True, True]


def test_identical_pictures_under_the_same_mask_are_one_with_all_captions(learned_from):
    captions = [("a",), ("b",), ("a", "c")]
    data = learned_from([picture(1)] * 3, [half(True), half(True).clone(), half(True)], captions)
    assert [example.captions for example in data.examples] == [("a", "b", "c")]
    assert len(data.views) == 8


@pytest.mark.parametrize("quality", [95, 75])
def test_compressed_copy_stays_and_is_not_the_image_prompt_of_its_original(learned_from, quality):
    original = picture(1, 128)
    data = learned_from([original, as_jpeg(original, quality), picture(2)], [None] * 3)
    assert len(data.examples) == 3
    assert not {(0, 1), (1, 0)} & references(data)


def test_smaller_copy_is_not_the_image_prompt_of_its_original(learned_from):
    original = picture(1, 128)
    smaller = torch.nn.functional.interpolate(original, (96, 96), mode="bicubic", antialias=True).clamp(0, 1)
    assert not {(0, 1), (1, 0)} & references(learned_from([original, smaller, picture(2)], [None] * 3))


def test_a_subject_that_moved_on_the_same_ground_makes_another_picture(learned_from):
    ground = torch.full((1, 3, 64, 64), 0.9)
    one, other = ground.clone(), ground.clone()
    one[..., 20:28, 20:28] = 0.2
    other[..., 20:28, 36:44] = 0.2
    assert references(learned_from([one, other], [None] * 2)) == {(0, 1), (1, 0)}


def test_views_show_something_of_a_small_subject_in_a_corner(learned_from):
    mask = torch.zeros(64, 64)
    mask[:8, :8] = 1
    data = learned_from([picture(3)], [mask])
    assert data.views and all(view.mask.amax() >= 0.1 for view in data.views)


def test_views_follow_from_the_seed(learned_from):
    first, again, other = (learned_from([picture(1)], [None], seed=seed).views for seed in (1, 1, 2))
    same = [torch.equal(a.latent, b.latent) for a, b in zip(first, again, strict=True)]
    assert all(same) and not any(torch.equal(a.latent, b.latent) for a in first for b in other)
