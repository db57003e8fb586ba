"""How pictures become an image prompt: which part of each lies where in the square, and in which order they come."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SIDE = 64


@pytest.fixture(scope="module")
def vae(load_checkpoint):
    return load_checkpoint("sd15")[2]


@pytest.fixture(scope="module")
def encode(comfy_host, pack_nodes, vae) -> Callable:
    """`encode(images, fit="pad")` is the image prompt, at 64 pixels."""

    def run(images, **inputs):
        return comfy_host.execute("EncodeImagePrompt", images=images, vae=vae, **{"resolution": SIDE, **inputs})[0]

    return run


def ramp(height: int, width: int) -> Tensor:
    """IMAGE (1, h, w, 3): red says how far a pixel is from the left edge, green from the top, as shares."""
    green, red = torch.meshgrid(_shares(height), _shares(width), indexing="ij")
    return torch.stack([red, green, torch.full_like(red, 0.25)], dim=-1)[None]


def _shares(count: int) -> Tensor:
    return (torch.arange(count) + 0.5) / count


@pytest.mark.parametrize(
    "height, width, fit, rows, columns",
    [
        (64, 128, "crop", (0.0, 1.0), (0.25, 0.75)),
        (160, 64, "crop", (0.3, 0.7), (0.0, 1.0)),
        (32, 128, "crop", (0.0, 1.0), (0.375, 0.625)),
        (64, 128, "stretch", (0.0, 1.0), (0.0, 1.0)),
        (200, 64, "stretch", (0.0, 1.0), (0.0, 1.0)),
        (64, 64, "pad", (0.0, 1.0), (0.0, 1.0)),
        (64, 128, "pad", (-0.5, 1.5), (0.0, 1.0)),
        (128, 64, "pad", (0.0, 1.0), (-0.5, 1.5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_masked", [False, True])
def test_square_shows_the_part_that_fit_names(comfy_host, height, width, fit, rows, columns, is_masked):
    """The mask is the picture's red, so both have to be cut, moved and resized alike."""
    from sa_inject.nodes.host.images import fit_picture

    image = ramp(height, width)
    mask = image[0, ..., 0] if is_masked else None
    picture, found = fit_picture(image.movedim(-1, 1), mask, SIDE, fit)
    assert picture.shape == (1, 3, SIDE, SIDE)
    y, x = torch.meshgrid(_between(rows), _between(columns), indexing="ij")
    inside = (y > 0) & (y < 1) & (x > 0) & (x < 1)
    expected = torch.stack([x, y, torch.full_like(x, 0.25)])
    near = 4 / min(height, width, SIDE)  # resizing smooths at the edges
    assert (picture[0] - expected).abs()[:, inside].max() < near
    assert torch.equal(picture[0][:, ~inside], torch.full_like(picture[0][:, ~inside], 0.5))
    if found is None:
        assert not is_masked and inside.all()
    else:
        assert found.shape == (SIDE, SIDE) and not found[~inside].any()
        assert (found - (x if is_masked else 1.0)).abs()[inside].max() < near


def _between(ends: tuple[float, float]) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * _shares(SIDE)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_latent_is_that_of_the_square(encode, vae, fit):
    from sa_inject.nodes.host.images import fit_picture

    image = ramp(64, 128)
    (picture,) = encode(image, fit=fit).pictures
    square, _ = fit_picture(image.movedim(-1, 1), None, SIDE, fit)
    with torch.inference_mode():
        assert torch.equal(picture.latent, vae.encode(square.movedim(1, -1)))


def test_resolution_is_the_side_of_the_square(encode):
    (picture,) = encode(ramp(64, 128), resolution=192).pictures
    assert picture.latent.shape == (1, 4, 24, 24)


def test_pictures_and_masks_keep_their_order_behind_the_earlier_ones(encode):
    images = [ramp(64, 64) * share for share in (1.0, 0.6, 0.2)]
    masks = [_white_left_of(columns) for columns in (16, 32, 48)]
    alone = [encode(image, mask=mask) for image, mask in zip(images, masks, strict=True)]
    found = encode(images[1:], mask=masks[1:], image_prompt=alone[0]).pictures
    assert len(found) == 3
    for picture, expected in zip(found, (prompt.pictures[0] for prompt in alone), strict=True):
        assert torch.allclose(picture.latent, expected.latent, atol=1e-5) and torch.equal(picture.mask, expected.mask)
    assert [float(picture.mask.mean()) for picture in found] == [0.25, 0.5, 0.75]


def test_transparent_parts_become_grey(encode):
    clear = torch.cat([ramp(64, 64), _white_left_of(32)[..., None]], dim=-1)
    grey = ramp(64, 64)
    grey[:, :, 32:] = 0.5
    assert torch.equal(encode(clear).pictures[0].latent, encode(grey).pictures[0].latent)


def _white_left_of(columns: int) -> Tensor:
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :, :columns] = 1
    return mask
