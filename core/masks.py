"""Masks at token resolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .schedule import MASK_THRESHOLD

TIE: float = 1e-4  # averages this close to the best count as equal, against rounding


def downsample_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Average masks over the area of each token. mask (..., h, w) in 0..1 -> (..., height*width) in 0..1

    Computed on the CPU, because Metal cannot average areas of unequal size. The result stays on the CPU.
    """
    single = mask.cpu().float().reshape(-1, 1, *mask.shape[-2:])
    return F.adaptive_avg_pool2d(single, (height, width)).reshape(*mask.shape[:-2], height * width)


def token_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Which tokens a subject mask keeps. mask (..., h, w) in 0..1 -> (..., height*width) bool, on the CPU

    If no token reaches MASK_THRESHOLD, the tokens with the highest average are kept. So a small or faint subject is not
    lost at a coarse layer. An empty mask keeps the first token.
    """
    weights = downsample_mask(mask, height, width)
    kept = weights >= MASK_THRESHOLD
    best = (weights > 0) & (weights >= weights.amax(-1, keepdim=True) - TIE)
    first = F.one_hot(weights.new_zeros(weights.shape[:-1]).long(), weights.shape[-1]).bool()
    best = torch.where(best.any(-1, keepdim=True), best, first)
    return torch.where(kept.any(-1, keepdim=True), kept, best)
