"""Image prompts add up, and their fingerprint tells apart what draws differently."""

import itertools

import pytest
import torch

from sa_inject.core.image_prompt import ImagePrompt, Picture, ReferenceText

LATENT = torch.arange(64.0).view(1, 4, 4, 4)
MASK = torch.eye(8)
TEXT = torch.linspace(0, 1, 6).view(1, 2, 3)
POOLED = torch.ones(1, 3)


def picture(**changes) -> Picture:
    return Picture(**{"latent": LATENT, "mask": MASK, "text": ReferenceText(TEXT, POOLED)} | changes)


def test_pictures_add_up_in_order():
    first, second, third = picture(), picture(mask=None), picture(text=None)
    both = ImagePrompt((first, second)) + ImagePrompt((third,))
    assert [id(p) for p in both.pictures] == [id(first), id(second), id(third)]


DIFFERENT = {
    "the same": picture(),
    "another latent": picture(latent=LATENT + 1e-3),
    "another shape": picture(latent=LATENT.view(1, 4, 2, 8)),
    "another mask": picture(mask=MASK.flip(0)),
    "no mask": picture(mask=None),
    "another text": picture(text=ReferenceText(TEXT * 2, POOLED)),
    "another pooled": picture(text=ReferenceText(TEXT, POOLED * 2)),
    "no pooled": picture(text=ReferenceText(TEXT)),
    "no text": picture(text=None),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(DIFFERENT, 2)))
def test_fingerprint_tells_pictures_apart(one, other):
    assert ImagePrompt((DIFFERENT[one],)).fingerprint() != ImagePrompt((DIFFERENT[other],)).fingerprint()


def test_fingerprint_tells_number_and_order_apart():
    a, b = picture(), picture(mask=None)
    prompts = [(a,), (a, a), (a, b), (b, a), ()]
    assert len({ImagePrompt(pictures).fingerprint() for pictures in prompts}) == len(prompts)


def test_fingerprint_is_of_the_content():
    copied = Picture(
        LATENT.double().transpose(2, 3).contiguous().transpose(2, 3),  # other memory, another layout, the same numbers
        MASK.half(),
        ReferenceText(TEXT.clone().requires_grad_(), POOLED.clone()),
    )
    assert ImagePrompt((copied,)).fingerprint() == ImagePrompt((picture(),)).fingerprint()
