"""The model's own training loss, in the space of the network's output."""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_loss(denoised: Tensor, latent: Tensor, output_scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error between the network's output and its target, row by row.

    denoised, latent (b, c, h, w), output_scale (b, 1, 1, 1), mask (b, 1, h, w) in 0..1 -> (b,)

    `denoised` is affine in the raw output F with slope `output_scale`. So ((denoised - latent) / output_scale)^2 is (F
    - F*)^2, the eps, v or flow loss that the model was trained with.
    """
    error = ((denoised.float() - latent.float()) / output_scale).square()  # (b, c, h, w)
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    weight = mask.float().expand_as(error)
    return (error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=torch.finfo(torch.float32).eps)
