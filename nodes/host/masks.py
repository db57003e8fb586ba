"""Convert and check ComfyUI's masks: one for each picture, white where the subject is.

The host's loaders give inverted masks: white where a picture is transparent. For a picture without transparency they
give a black mask of 64x64 pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

HOST_PLACEHOLDER = (64, 64)  # the size of LoadImage's black mask for a picture without transparency
LATENT_CELL = 8  # pixels
LEAST_COVER = 0.1  # of the best covered cell; less is noise of a compressed file, or a single dot
SMALL_SHARE = 0.005  # of a picture: smaller subjects are learned badly


def split_masks(masks: Sequence[Tensor] | None, pictures: Sequence[Tensor], what: str) -> list[Tensor | None]:
    """One mask (h, w) in 0..1 for each picture, white where the subject is. None: the whole picture counts.

    One mask alone serves all pictures of its size. Raises ValueError for another count or size, and for a mask that
    leaves nothing of its picture.
    """
    if not masks:
        return [None] * len(pictures)
    single_masks = [single for mask in masks for single in mask.reshape(-1, *mask.shape[-2:])]
    if len(single_masks) == 1:
        single_masks = single_masks * len(pictures)
    if len(single_masks) != len(pictures):
        raise ValueError(
            f"{what}: {len(single_masks)} masks came with {len(pictures)} images. Connect one for each image, or one "
            "for all."
        )
    checked, placeholders = [], []
    for number, (mask, picture) in enumerate(zip(single_masks, pictures, strict=True), start=1):
        if _is_placeholder(mask, picture):
            placeholders.append(str(number))
            checked.append(None)
        else:
            checked.append(_mask_of(mask.cpu().float(), picture, number, what))
    if placeholders:
        log.info(
            "%s: LoadImage found no transparency, so the mask says nothing and the whole picture counts: image %s.",
            what,
            ", ".join(placeholders),
        )
    return checked


def check_leaves_something(mask: Tensor | None, number: int, what: str, size: tuple[int, int] | None = None) -> None:
    """Raise ValueError if a mask (h, w) leaves nothing, or almost nothing, of its picture.

    size: height and width to which picture and mask were resized and cropped.
    """
    if mask is None:
        return
    if not keeps_something(mask):
        share = mask.mean().item()
        extent = "nothing" if share == 0 else f"next to nothing ({share:.2%})"
        if size is not None:
            raise ValueError(
                f"{what}: mask {number} leaves {extent} of image {number} when it is resized and cut to "
                f"{size[1]}x{size[0]} pixels. Cut the picture around the subject, or leave the mask away."
            )
        raise ValueError(
            f"{what}: mask {number} leaves {extent} of image {number}. A mask is white where the subject is. If this "
            "one is the other way round, put InvertMask between. LoadImage gives a black mask for a picture without "
            "transparency: disconnect it then."
        )
    if size is not None and mask.mean().item() < SMALL_SHARE:
        log.warning("%s: mask %d leaves only %.2f %% of image %d.", what, number, 100 * mask.mean().item(), number)


def keeps_something(mask: Tensor) -> bool:
    """Whether a mask (h, w) covers enough of at least one latent cell."""
    cells = F.avg_pool2d(mask[None, None], LATENT_CELL, ceil_mode=True, count_include_pad=False)
    return cells.amax().item() >= LEAST_COVER


def resized_mask(mask: Tensor | None, height: int, width: int) -> Tensor | None:
    return None if mask is None else F.adaptive_avg_pool2d(mask[None], (height, width))[0]


def cropped_mask(mask: Tensor | None, height: int, width: int) -> Tensor | None:
    if mask is None:
        return None
    top, left = (mask.shape[0] - height) // 2, (mask.shape[1] - width) // 2
    return mask[top : top + height, left : left + width]


def _is_placeholder(mask: Tensor, picture: Tensor) -> bool:
    """Whether this is LoadImage's black mask for a picture without transparency; white: after InvertMask."""
    if mask.shape != HOST_PLACEHOLDER or picture.shape[-2:] == HOST_PLACEHOLDER:
        return False
    return bool((mask == 0).all() or (mask == 1).all())


def _mask_of(mask: Tensor, picture: Tensor, number: int, what: str) -> Tensor | None:
    if mask.shape != picture.shape[-2:]:
        hint = " LoadImage gives 64x64 for a picture without transparency: disconnect the mask then."
        raise ValueError(
            f"{what}: mask {number} is {mask.shape[1]}x{mask.shape[0]} pixels, but image {number} is "
            f"{picture.shape[-1]}x{picture.shape[-2]}. Resize the mask to the image."
            f"{hint if mask.shape == HOST_PLACEHOLDER else ''}"
        )
    if not bool(mask.isfinite().all()):
        raise ValueError(f"{what}: mask {number} holds NaN or infinite values. Save it again.")
    if not 0 <= mask.amin() <= mask.amax() <= 1:
        mask = mask.clamp(0, 1)
    if bool((mask == 1).all()):
        return None
    check_leaves_something(mask, number, what)
    return mask
