"""Encode training pictures as latents, with their flipped, cropped and recolored versions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....trainer.augment import jittered
from ....trainer.captions import class_captions
from ....trainer.examples import Example, Version
from ....trainer.options import TrainOptions
from ..images import bucket_size, cover, encode_picture
from ..masks import resized_mask
from ..tensor_store import TensorStore

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

log = logging.getLogger(__name__)

LATENT_BYTES = 256 * 2**20  # of latents in memory; 1000 pictures of 512x512 pixels take 65 MB
COLORS = 4  # versions of an image prompt in other colours
CELL = 8  # pixels, the side of a latent pixel
PURPOSE = 1  # added to the seed, because the augmented views use the seed itself


class ExampleEncoder:
    """Encodes one picture at a time, so that only one has to be in memory. resolution: pixels"""

    def __init__(self, model: ModelPatcher, vae: VAE, resolution: int, options: TrainOptions, seed: int) -> None:
        self._model = model
        self._vae = vae
        self._resolution = resolution
        self._options = options
        self._generator = torch.Generator().manual_seed((seed + PURPOSE) % 2**64)
        self._store = TensorStore(LATENT_BYTES)

    def example(
        self, picture: Tensor, mask: Tensor | None, large: Tensor | None = None, large_mask: Tensor | None = None
    ) -> Example:
        """Encode a picture (1, 3, h, w) with its mask (h, w). large, large_mask: both at the size for random crops."""
        plain = self._version(picture, mask)
        flips = self._options.horizontal_flips
        as_target: list[Version] = [] if large is None else [self._version(large, large_mask)]
        if flips:
            as_target += (
                [self._flipped(large, large_mask)] if large is not None else [plain, self._flipped(picture, mask)]
            )
        as_reference = [plain, self._flipped(picture, mask)] if flips else []
        if self._options.color_jitter > 0:
            as_reference = as_reference or [plain]
            for number in range(COLORS):
                colored = jittered(picture, self._options.color_jitter, self._generator)
                is_flipped = flips and number % 2 == 1
                as_reference.append(self._flipped(colored, mask) if is_flipped else self._version(colored, mask))
        return Example(plain.latent, (), plain.mask, None, tuple(as_target), tuple(as_reference))

    def class_example(self, picture: Tensor, class_word: str) -> Example:
        fitted, _ = cover(picture, None, bucket_size(picture.shape[-2], picture.shape[-1], self._resolution))
        return Example(self._version(fitted, None).latent, class_captions(class_word))

    def enlarged_size(self, fitted: Tensor) -> tuple[int, int] | None:
        """Height and width from which crops of the fitted size are cut. None: no random crops."""
        share = self._options.random_crops
        if share == 0:
            return None
        height, width = (CELL * max(side // CELL + 1, round(side / (1 - share) / CELL)) for side in fitted.shape[-2:])
        return height, width

    def log_summary(self) -> None:
        if self._store.on_disk:
            log.info("%d latents do not fit into %d MB and lie on disk.", self._store.on_disk, LATENT_BYTES // 2**20)

    def _flipped(self, picture: Tensor, mask: Tensor | None) -> Version:
        return self._version(picture.flip(-1), None if mask is None else mask.flip(-1))

    def _version(self, picture: Tensor, mask: Tensor | None) -> Version:
        latent = encode_picture(self._vae, picture, self._model.model.latent_format.latent_channels)
        small = resized_mask(mask, *latent.shape[-2:])
        return Version(self._store.keep(self._model.model.process_latent_in(latent).cpu()), small)
