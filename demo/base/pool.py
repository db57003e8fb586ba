"""Scenes of base objects, encoded once and used many times: encoding costs almost as much as training."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .artwork import LARGE, SMALL
from .autoencoder import encode, load_autoencoder
from .scenes import WORDINGS, caption, random_large_scene, random_scene, render
from .threads import FreeCores

log = logging.getLogger(__name__)

CHUNK: int = 16
CLASS_WORD_SHARE: float = 0.1  # of captions with the class, "animal" for "fox"


class Pool(NamedTuple):
    latents: Tensor  # (n, 4, h, w) float16, as the UNet sees them
    captions: list[str]


class Scenes(Dataset):
    """Pictures of base objects with captions, in chunks that depend on the seed and their index only."""

    def __init__(self, count: int, image_size: int, seed: int, world: str):
        self._count, self._image_size, self._seed, self._world = count, image_size, seed, world

    def __len__(self) -> int:
        return -(-self._count // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[list[Image.Image], list[str]]:
        rng = np.random.RandomState((self._seed + 7919 * chunk) % 2**32)
        draw = random_large_scene if self._world == LARGE else random_scene
        scenes = [draw(rng) for _ in range(min(CHUNK, self._count - CHUNK * chunk))]
        captions = []
        for scene in scenes:
            word = scene.artwork.class_word if rng.rand() < CLASS_WORD_SHARE else None
            captions.append(caption(scene, rng.randint(len(WORDINGS)), word))
        return [render(scene, self._image_size) for scene in scenes], captions


def make_pool(
    path: Path,
    autoencoder: Path,
    *,
    image_size: int,
    count: int,
    seed: int,
    device: str,
    world: str = SMALL,
    workers: int = 0,
) -> Pool:
    """The pool stored at `path`. Missing scenes are created and added first."""
    latents, captions = torch.load(path, weights_only=True) if path.exists() else (torch.zeros(0), [])
    found, said = [latents] if captions else [], list(captions)
    if len(said) < count:
        model = load_autoencoder(autoencoder, device)
        scenes = Scenes(count, image_size, seed, world)
        whole = len(said) // CHUNK  # the last chunk of a smaller pool may have been cut
        found, said = [latents[: whole * CHUNK]] if whole else [], said[: whole * CHUNK]
        chunks = DataLoader(Subset(scenes, range(whole, len(scenes))), batch_size=None, num_workers=workers)
        cores = FreeCores()
        for pictures, texts in chunks:
            cores.adjust()
            found.append(encode(model, pictures, device).half())
            said += texts
            if len(said) % (32 * CHUNK) == 0:
                log.info("pool %d px %d/%d", image_size, len(said), count)
                _keep(path, found, said)
        _keep(path, found, said)
    return Pool(torch.cat(found), said)


def _keep(path: Path, latents: list[Tensor], captions: list[str]) -> None:
    partial = path.with_suffix(".part")
    torch.save((torch.cat(latents), captions), partial)
    os.replace(partial, path)
