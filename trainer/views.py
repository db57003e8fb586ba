"""Augmented views of a single picture, so that it can be its own reference without being copied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = 0.5


def augmented_views(
    picture: Tensor, mask: Tensor | None, count: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor | None]]:
    """Flip, scale and move. If there is a mask, also change the background.

    picture (1, 3, h, w) in 0..1, mask (h, w) in 0..1 -> `count` pairs of the same sizes
    """
    return [_view(picture, mask, generator) for _ in range(count)]


def _view(picture: Tensor, mask: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    flip, plain, zoom, x, y, *colour = map(float, torch.rand(8, generator=generator))
    layers = picture if mask is None else torch.cat([picture, mask[None, None].to(picture)], dim=1)
    if flip < 0.5:
        layers = layers.flip(-1)
    # The picture is sampled at theta * position: a scale below 1 zooms in, above 1 shows grey around it.
    scale = 0.6 + 0.8 * zoom
    room = abs(1 - scale)
    theta = torch.tensor([[scale, 0.0, room * (2 * x - 1)], [0.0, scale, room * (2 * y - 1)]])[None]
    grid = F.affine_grid(theta.to(layers), list(layers.shape), align_corners=False)
    layers = F.grid_sample(layers - GREY, grid, align_corners=False) + GREY  # outside the picture: grey
    view = layers[:, :3].clamp(0, 1)
    if mask is None:
        return view, None
    inside = F.grid_sample(torch.ones_like(layers[:, :1]), grid, align_corners=False)
    subject = (layers[:, 3:] * inside).clamp(0, 1)
    if plain < 0.5:
        background = torch.tensor(colour).to(view).view(1, 3, 1, 1)
        view = view * subject + background * (1 - subject)
    return view, subject[0, 0]
