"""Scenes of base objects, encoded once and drawn from many times: encoding costs almost as much as training."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .autoencoder import encode, load_autoencoder
from .threads import FreeCores
from .world import WORDINGS, caption, random_scene, render

log = logging.getLogger(__name__)

CLASS_WORD_SHARE: float = 0.1  # of captions say "animal" for "fox", so that class words mean something to the base


class Pool(NamedTuple):
    latents: Tensor  # (n, 4, h, w) float16, as the UNet sees them
    captions: list[str]


def make_pool(path: Path, autoencoder: Path, *, image_size: int, count: int, seed: int, device: str) -> Pool:
    """The pool kept at `path`, made first if it is not there."""
    if path.exists():
        return Pool(*torch.load(path, weights_only=True))
    model = load_autoencoder(autoencoder, device)
    rng = np.random.RandomState(seed)
    cores = FreeCores()
    latents: list[Tensor] = []
    captions: list[str] = []
    for start in range(0, count, 16):
        cores.adjust()
        scenes = [random_scene(rng) for _ in range(min(16, count - start))]
        latents.append(encode(model, [render(scene, image_size) for scene in scenes], device).half())
        for scene in scenes:
            word = scene.artwork.class_word if rng.rand() < CLASS_WORD_SHARE else None
            captions.append(caption(scene, rng.randint(len(WORDINGS)), word))
        if start % 1024 == 0:
            log.info("pool %d px %d/%d", image_size, start, count)
    pool = Pool(torch.cat(latents), captions)
    partial = path.with_suffix(".part")
    torch.save(tuple(pool), partial)
    os.replace(partial, path)
    return pool
