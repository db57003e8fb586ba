"""Read a folder as lists of images, captions and masks. Files that cannot be used are left out and reported."""

from __future__ import annotations

import locale
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as model_management
import torch
from torch import Tensor
from torch.nn import functional as F

from .dataset_files import Entry, children, dataset_folder, is_hidden, list_entries
from .masks import keeps_something
from .picture_file import UnreadablePictureError, read_mask, read_picture, shown
from .tensor_store import TensorStore

log = logging.getLogger(__name__)

TRIGGER = re.compile(re.escape("[trigger]"), re.IGNORECASE)
SAME_ASPECT = 0.02
NAMES_TOLD = 10
PICTURE_BYTES = 2**28  # of all pictures and masks that stay in memory; one of 1 megapixel takes 16 MB


@dataclass(frozen=True)
class Dataset:
    """IMAGE (1, h, w, 3), caption and MASK (1, h, w) of every picture, and the files left out with reasons."""

    images: list[Tensor]
    captions: list[str]
    masks: list[Tensor]
    left_out: list[str]

    def counts(self) -> str:
        captions, masks = sum(map(bool, self.captions)), sum(bool((mask < 1).any()) for mask in self.masks)
        return f"{_count(len(self.images), 'picture')}, {_count(captions, 'caption')}, {_count(masks, 'mask')}"

    def summary(self) -> str:
        return self.counts() if not self.left_out else f"{self.counts()}; left out: {_first_and_count(self.left_out)}"


def read_dataset(name: str, placeholder_token: str) -> Dataset:
    """Read a folder, in an order that is the same on every system.

    Files that cannot be used are left out and reported. Raises ValueError if nothing is left.
    """
    return read_folder(dataset_folder(name), name, placeholder_token)


def read_folder(folder: Path, name: str, placeholder_token: str) -> Dataset:
    """Like `read_dataset`, for any folder. name: of the folder, for messages"""
    entries = list_entries(folder)
    if not entries:
        raise ValueError(_empty(name, folder))
    images, captions, masks, left_out = [], [], [], []
    store = TensorStore(PICTURE_BYTES)
    for entry in entries:
        model_management.throw_exception_if_processing_interrupted()
        try:
            image, mask = _read(entry)
        except UnreadablePictureError as error:
            left_out.append(f"{shown(entry.picture.relative_to(folder).as_posix())}: {error}")
            continue
        images.append(store.keep(image))
        masks.append(store.keep(mask[None]))
        captions.append("" if entry.caption is None else _caption(entry.caption, placeholder_token))
    for reason in left_out:
        log.warning("Left out of '%s': %s", shown(name), reason)
    if not images:
        raise ValueError(
            f"None of {_count(len(entries), 'picture')} in '{shown(name)}' can be used: {_first_and_count(left_out)}."
        )
    dataset = Dataset(images, captions, masks, left_out)
    log.info("Loaded '%s': %s.", shown(name), dataset.counts())
    return dataset


def _read(entry: Entry) -> tuple[Tensor, Tensor]:
    """IMAGE (1, h, w, 3) and its mask (h, w), white if there is none."""
    image, alpha = read_picture(entry.picture)
    height, width = image.shape[1:3]
    mask = torch.ones(height, width) if alpha is None else alpha
    if entry.mask is not None:
        try:
            mask = mask * _fitted(read_mask(entry.mask), height, width)
        except UnreadablePictureError as error:
            raise UnreadablePictureError(f"its mask {shown(entry.mask.name)} cannot be used, {error}") from error
    if not keeps_something(mask):
        cause = "it is transparent everywhere" if entry.mask is None else "its mask leaves nothing of it"
        raise UnreadablePictureError(f"{cause} (white is the subject)" if entry.mask is not None else cause)
    return image, mask


def _fitted(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize a mask of the same aspect ratio to the picture's size."""
    tall, wide = mask.shape
    if (tall, wide) == (height, width):
        return mask
    if abs(wide * height / (tall * width) - 1) > SAME_ASPECT:
        turned = abs(tall * height / (wide * width) - 1) <= SAME_ASPECT
        hint = ": it lies on its side" if turned else ""
        raise UnreadablePictureError(f"it is {wide}x{tall} pixels and the picture {width}x{height}{hint}")
    return F.interpolate(mask[None, None], (height, width), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def _caption(path: Path, placeholder_token: str) -> str:
    """The text in one line, with the placeholder for [trigger]."""
    text = " ".join(_decoded(path).split())
    return TRIGGER.sub(lambda _: placeholder_token, text) if placeholder_token else text


def _decoded(path: Path) -> str:
    """UTF-8 with or without BOM, UTF-16 with BOM, else the system's encoding."""
    try:
        data = path.read_bytes()
    except OSError as error:
        log.warning("The caption %s cannot be read: %s", shown(path.name), error.strerror)
        return ""
    encodings = ["utf-16"] if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ["utf-8-sig"]
    for encoding in (*encodings, locale.getpreferredencoding(False)):
        try:
            return data.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    log.warning(
        "The caption %s is not UTF-8; what could not be read is marked with \ufffd. Save it as UTF-8.", shown(path.name)
    )
    return data.decode("utf-8", "replace")


def _empty(name: str, folder: Path) -> str:
    inside = [child.name for child in children(folder) if not is_hidden(child.name) and os.path.isdir(child)]
    inside = [child for child in inside if list_entries(folder / child)]
    where = f" There are pictures in its sub-folder '{shown(name)}/{shown(inside[0])}': choose that." if inside else ""
    return f"There are no pictures in '{shown(name)}'. Put 3 to 10 pictures of the subject into it (PNG, JPEG).{where}"


def _first_and_count(reasons: Sequence[str]) -> str:
    rest = len(reasons) - NAMES_TOLD
    return "; ".join(reasons[:NAMES_TOLD]) + (f"; and {rest} more" if rest > 0 else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
