"""Read one picture file: upright, in sRGB, with its transparency as a mask."""

from __future__ import annotations

import contextlib
import io as bytes_io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps
from torch import Tensor

from .images import GREY

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .tga .ppm .pgm .pbm .jp2 .j2k .mpo "
    ".avif .heic .heif .hif .jxl".split()
)
UNSUPPORTED = frozenset(
    ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .pef .psd .xcf .kra .svg".split()
)  # raw files of cameras, project files of programs
MOST_PIXELS = 178_956_970  # twice PIL's warning limit; a small file may claim any size
LEAST_SIDE = 16  # pixels
MOST_ASPECT = 20
ENOUGH_PIXELS = 4096 * 4096  # larger pictures are scaled down to it
SIXTEEN_BIT = 65535.0


class UnreadablePictureError(ValueError):
    """The file cannot be used. The text gives the reason, to be put behind the file's name."""


def read_picture(path: Path) -> tuple[Tensor, Tensor | None]:
    """The first frame as IMAGE (1, h, w, 3) in 0..1, and its alpha (h, w), None if it is opaque.

    Transparent parts are composed onto grey. Raises UnreadablePictureError.
    """
    with _reasons(path):
        picture = _opened(path)
        if not _has_alpha(picture):
            return _rgb(picture, path)[None], None
        is_grey, profile = picture.mode in ("L", "LA", "La"), picture.info.get("icc_profile")
        rgba = _rgba(picture)
        colours = rgba.convert("L" if is_grey else "RGB")
        alpha = _values(rgba.getchannel("A")) / 255
        rgb = _values(_in_srgb(colours, profile, path)) / 255
        rgb = rgb * alpha[..., None] + GREY * (1 - alpha[..., None])
        return rgb[None], None if bool((alpha == 1).all()) else alpha


def read_mask(path: Path) -> Tensor:
    """A mask file as (h, w) in 0..1: its brightness. Transparent parts are black. Raises UnreadablePictureError."""
    with _reasons(path):
        picture = _opened(path)
        if not _has_alpha(picture):
            return _rgb(picture, path).mean(-1)
        rgba = _rgba(picture)
        return _values(rgba.convert("RGB")).mean(-1) / 255 * _values(rgba.getchannel("A")) / 255


@contextlib.contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Turn PIL's exceptions into UnreadablePictureError with a short reason."""
    suffix = path.suffix.lower()
    try:
        yield
    except UnreadablePictureError:
        raise
    except Image.UnidentifiedImageError:
        if suffix in (".heic", ".heif", ".hif", ".avif", ".jxl"):
            raise UnreadablePictureError(
                f"this Python cannot read {suffix[1:].upper()}: save it as PNG or JPEG"
            ) from None
        raise UnreadablePictureError("it is no picture, or damaged") from None
    except Image.DecompressionBombError:
        raise UnreadablePictureError("it claims more pixels than any picture has: save it smaller") from None
    except MemoryError:
        raise UnreadablePictureError("there is not enough memory for it") from None
    except Exception as error:  # PIL's readers raise many kinds of exceptions
        raise UnreadablePictureError(f"it is damaged ({error or type(error).__name__})") from error


def _opened(path: Path) -> Image.Image:
    """Decode, turn upright, and limit the size."""
    suffix = path.suffix.lower()
    if suffix in UNSUPPORTED:
        raise UnreadablePictureError(f"{suffix[1:].upper()} is no finished picture: export it as PNG or JPEG")
    with _strictly(), Image.open(path) as file:
        _check_size(*file.size)
        file.load()
        return _of_useful_size(_upright(file))


def _of_useful_size(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    if width * height <= ENOUGH_PIXELS or picture.mode.startswith(("I", "F")):
        return picture
    profile = picture.info.get("icc_profile")
    if _has_alpha(picture):
        picture = _rgba(picture)
    elif picture.mode in ("1", "P"):
        picture = picture.convert("RGB")
    ratio = (ENOUGH_PIXELS / (width * height)) ** 0.5
    smaller = picture.resize((max(1, int(width * ratio)), max(1, int(height * ratio))), Image.Resampling.LANCZOS)
    smaller.info = {} if profile is None else {"icc_profile": profile}
    return smaller


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UnreadablePictureError(f"it is {width}x{height} pixels: save it smaller")
    if min(width, height) < LEAST_SIDE:
        raise UnreadablePictureError(f"it is only {width}x{height} pixels")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise UnreadablePictureError(f"it is {width}x{height} pixels, a strip: cut it to the subject")


@contextlib.contextmanager
def _strictly() -> Iterator[None]:
    """Refuse truncated files, even if another pack allows them for the whole process."""
    allowed, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed


def _upright(file: Image.Image) -> Image.Image:
    try:
        picture = ImageOps.exif_transpose(file)
    except Exception as error:  # damaged EXIF; the pixels can be used
        log.debug("EXIF could not be read: %s", error)
        picture = file.copy()
    return file.copy() if picture is None else picture


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or (
        "transparency" in picture.info and picture.mode in ("1", "L", "P", "RGB")
    )


def _rgba(picture: Image.Image) -> Image.Image:
    return (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")


def _rgb(picture: Image.Image, path: Path) -> Tensor:
    """(h, w, 3) in 0..1"""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return _grey_of_many_bits(picture)[..., None].expand(-1, -1, 3)
    if picture.mode in ("P", "1", "HSV"):
        profile, picture = picture.info.get("icc_profile"), picture.convert("RGB")
    else:
        profile = picture.info.get("icc_profile")
    return _values(_in_srgb(picture, profile, path)) / 255


def _grey_of_many_bits(picture: Image.Image) -> Tensor:
    """16-bit grey, and 32-bit integers and floats of scientific programs. -> (h, w) in 0..1"""
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32).copy()).nan_to_num(0.0)
    highest = values.amax().item()
    if picture.mode == "F":
        top = 1.0 if highest <= 1 else 255.0 if highest <= 255 else SIXTEEN_BIT
    else:
        top = SIXTEEN_BIT
    return (values / max(top, highest)).clamp(0, 1)


def _in_srgb(picture: Image.Image, profile: bytes | None, path: Path) -> Image.Image:
    """Convert to sRGB. A profile that cannot be used is logged and ignored."""
    if picture.mode == "LAB":
        return ImageCms.profileToProfile(
            picture, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        ) or picture.convert("RGB")
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        try:
            embedded = ImageCms.ImageCmsProfile(bytes_io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, embedded, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except Exception as error:  # no littlecms in this PIL, or a profile of another colour space
            log.info("The colour profile of %s could not be used: %s", shown(path.name), error)
    return picture.convert("RGB")


def _values(picture: Image.Image) -> Tensor:
    """(h, w) or (h, w, c) as float"""
    return torch.from_numpy(np.array(picture)).float()


def shown(name: str) -> str:
    """A file name that any log can show: names on disk need not be valid text."""
    return name.encode("utf-8", "replace").decode("utf-8")
