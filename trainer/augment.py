"""Random crops and colours of training pictures, so that positions and colours are not learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_COVER = 0.1  # of one latent cell; crops that show less of the subject are not used
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def random_window(
    latent: Tensor, mask: Tensor | None, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """A random crop of a latent (1, c, h, w) and its mask (h, w) that shows some of the subject.

    `size` is the height and width of the crop in latent cells. All positions that show the subject are equally likely.
    If there is none, the crop is centred.
    """
    height, width = size
    rows, columns = latent.shape[-2] - height + 1, latent.shape[-1] - width + 1
    if rows * columns == 1:
        return latent, mask
    if mask is None:
        allowed = torch.ones(rows, columns)
    else:
        allowed = F.max_pool2d(mask[None, None].float(), (height, width), stride=1)[0, 0] >= LEAST_COVER
    positions = allowed.nonzero()  # (positions, 2)
    chosen = int(torch.randint(max(1, len(positions)), (), generator=generator))
    top, left = map(int, positions[chosen]) if len(positions) else (rows // 2, columns // 2)
    part = (..., slice(top, top + height), slice(left, left + width))
    return latent[part], None if mask is None else mask[part]


def jittered(picture: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation of a picture (1, 3, h, w) by factors of up to 1 +- amount."""
    brightness, contrast, saturation = map(float, 1 + amount * (2 * torch.rand(3, generator=generator) - 1))
    picture = (picture * brightness).clamp(0, 1)
    grey = _luminance(picture)
    picture = (grey.mean() + contrast * (picture - grey.mean())).clamp(0, 1)
    grey = _luminance(picture)
    return (grey + saturation * (picture - grey)).clamp(0, 1)


def _luminance(picture: Tensor) -> Tensor:
    weights = torch.tensor(LUMINANCE).to(picture).view(1, 3, 1, 1)
    return (picture * weights).sum(dim=1, keepdim=True)  # (1, 1, h, w)
