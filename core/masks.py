"""Masks at the resolution of the tokens that they select."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KEEP_ABOVE: float = 0.5  # a token belongs to the subject when at least this share of its area does


def token_weights(mask: Tensor, height: int, width: int) -> Tensor:
    """Average a mask over the area of every token. mask (h, w) in 0..1 -> (height*width,) in 0..1"""
    return F.adaptive_avg_pool2d(mask[None, None].float(), (height, width)).flatten()


def kept_tokens(mask: Tensor, height: int, width: int) -> Tensor:
    """Say which tokens a subject mask keeps. mask (h, w) in 0..1 -> (height*width,) bool

    At least one token stays, the one that the mask covers best, so that a small subject is never lost at a coarse
    layer.
    """
    weights = token_weights(mask, height, width)
    kept = weights >= KEEP_ABOVE
    if not bool(kept.any()):
        kept = torch.zeros_like(kept).index_fill(0, weights.argmax(), True)
    return kept
