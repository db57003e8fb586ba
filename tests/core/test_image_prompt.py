"""Image prompts add up."""

import torch

from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage


def test_pictures_add_up_in_order():
    first, second, third = (ReferenceImage(torch.full((1, 4, 4, 4), float(i))) for i in range(3))
    both = ImagePrompt((first, second)) + ImagePrompt((third,))
    assert [id(p) for p in both.pictures] == [id(first), id(second), id(third)]
