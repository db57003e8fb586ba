"""Masks at the resolution of the tokens that they select."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_THRESHOLD: float = 0.5  # a token belongs to the subject when at least this share of its area does


TIE: float = 1e-4  # averages closer than this to the best are as good: rounding must not choose between them


def downsample_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Average masks over the area of every token. mask (..., h, w) in 0..1 -> (..., height*width) in 0..1

    On the CPU, where the result stays: Metal cannot average areas of unequal size.
    """
    single = mask.cpu().float().reshape(-1, 1, *mask.shape[-2:])
    return F.adaptive_avg_pool2d(single, (height, width)).reshape(*mask.shape[:-2], height * width)


def token_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Say which tokens subject masks keep. mask (..., h, w) in 0..1 -> (..., height*width) bool, on the CPU

    Where no token of a mask reaches MASK_THRESHOLD, the ones that it covers best stay, all of them if they are equal.
    So a small or faint subject is never lost at a coarse layer. A mask that covers nothing keeps the first token.
    """
    weights = downsample_mask(mask, height, width)
    kept = weights >= MASK_THRESHOLD
    best = (weights > 0) & (weights >= weights.amax(-1, keepdim=True) - TIE)
    first = F.one_hot(weights.new_zeros(weights.shape[:-1]).long(), weights.shape[-1]).bool()
    best = torch.where(best.any(-1, keepdim=True), best, first)
    return torch.where(kept.any(-1, keepdim=True), kept, best)
