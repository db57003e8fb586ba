"""How well the autoencoder keeps held-out subjects: a sheet to look at, and likeness by both judges."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .artwork import SMALL, Artwork, objects
from .autoencoder import TAESD, decode, encode, new_autoencoder, to_tensor
from .scenes import Scene, random_scene, render


def subject_scenes(artworks: tuple[Artwork, ...], count: int, seed: int = 5) -> list[Scene]:
    """`count` scenes of each, from a seed of their own."""
    rng = np.random.RandomState(seed)
    return [random_scene(rng, (artwork,)) for artwork in artworks for _ in range(count)]


def _model(weights: dict[str, Tensor], device: str) -> TAESD:
    model = new_autoencoder(0)
    model.load_state_dict(weights)
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def autoencoded(model: TAESD, images: list[Image.Image], device: str) -> list[Image.Image]:
    found: list[Image.Image] = []
    for start in range(0, len(images), 16):
        found += decode(model, encode(model, images[start : start + 16], device), device)
    return found


def sheet(weights: dict[str, Tensor], path: Path, world: str, device: str) -> None:
    """A sheet of held-out subjects, and below each its decoded picture."""
    shown = objects("held_out", world)
    scenes = subject_scenes(tuple(shown[i * len(shown) // 20] for i in range(20)), 1)
    real = [render(scene) for scene in scenes]
    decoded = autoencoded(_model(weights, device), real, device)
    picture = Image.new("RGB", (10 * 128, 4 * 128))
    for i, pair in enumerate(zip(real, decoded, strict=True)):
        for below, image in enumerate(pair):
            picture.paste(image, (i % 10 * 128, (i // 10 * 2 + below) * 128))
    picture.save(path)


def score(weights: dict[str, Tensor], device: str, count: int = 4) -> dict[str, float]:
    """Means over the small set's held-out subjects: cosine by the ImageNet judge and by ours, and PSNR."""
    from .imagenet import Embedder
    from .judge import Judge

    scenes = subject_scenes(objects("held_out", SMALL), count)
    real = [render(scene) for scene in scenes]
    decoded = autoencoded(_model(weights, device), real, device)
    found = {}
    for name, judge in (("imagenet", Embedder()), ("ours", Judge())):
        found[name] = float((judge.embed(real) * judge.embed(decoded)).sum(dim=1).mean())
    error = (to_tensor(real) - to_tensor(decoded)).square().mean(dim=(1, 2, 3))
    return {**found, "psnr": float(-10 * error.log10().mean())}
