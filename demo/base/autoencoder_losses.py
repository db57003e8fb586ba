"""What the autoencoder's loss compares beside pixels: image gradients, and a discriminator's opinion."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gradient_difference(decoded: Tensor, pixels: Tensor, scales: int = 3) -> Tensor:
    """Difference of the image gradients from the target's, at several scales."""
    error = decoded - pixels
    found = []
    for _ in range(scales):
        found += [
            (error[..., 1:] - error[..., :-1]).abs().mean(),
            (error[..., 1:, :] - error[..., :-1, :]).abs().mean(),
        ]
        error = F.avg_pool2d(error, 2)
    return torch.stack(found).mean()


class Discriminator(nn.Module):
    """A discriminator of patches: real or decoded (PatchGAN, Isola et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        widths = (3, 48, 96, 192)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [norm(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, norm(nn.Conv2d(widths[-1], 1, 3, 1, 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in 0..1 -> (b, 1, h/8, w/8), higher for patches that look real"""
        return self.layers(pixels * 2 - 1)
