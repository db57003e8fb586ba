"""The pictures on which the autoencoder is trained: crops of scenes."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .artwork import LARGE, catalogue
from .scenes import Scene, box, random_large_scene, random_scene, render


class Crops(Dataset):
    """The pictures of each step. They depend on seed and step only, so that a run can be resumed."""

    def __init__(self, world: str, seed: int, batch: int, crop: int):
        self._world, self._seed, self._batch, self._crop = world, seed, batch, crop

    def __getitem__(self, step: int) -> Tensor:
        """-> (b, 3, crop, crop) in uint8"""
        rng = np.random.RandomState((self._seed * 1_000_003 + step) % 2**32)
        crops = [np.asarray(crop(random_crop_scene(rng, self._world), rng, self._crop)) for _ in range(self._batch)]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def random_crop_scene(rng: np.random.RandomState, world: str) -> Scene:
    return random_large_scene(rng, catalogue(LARGE)) if world == LARGE else random_scene(rng, catalogue(world))


def crop(scene: Scene, rng: np.random.RandomState, side: int) -> Image.Image:
    """A crop that usually shows a part of the object, at scales and before backgrounds that scenes may not have."""
    image_size = (64, 96, 128, 128, 128, 128, 160, 192)[rng.randint(8)]
    picture = render(scene, image_size)
    left, top, right, bottom = box(scene, image_size)
    x = int(np.clip(rng.randint(left - side // 2, right - side // 2 + 1), 0, image_size - side))
    y = int(np.clip(rng.randint(top - side // 2, bottom - side // 2 + 1), 0, image_size - side))
    picture = picture.crop((x, y, x + side, y + side))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else picture
