"""The thumbnail of an adapter file. It is decoded and encoded again, because files may come from strangers."""

from __future__ import annotations

import base64
import binascii
import io as bytes_io

from PIL import Image, ImageOps

SIDE = 256  # pixels, the longer side
MOST_TEXT = 4 * 2**20  # letters of base64
MOST_PIXELS = 4096 * 4096  # a small file may claim any size
FORMATS = ("JPEG", "PNG", "WEBP")


def thumbnail_of(metadata: dict[str, str], side: int = SIDE) -> bytes | None:
    """The entry `modelspec.thumbnail` as WebP of at most `side` pixels. None if there is none that can be decoded."""
    text = metadata.get("modelspec.thumbnail", "")
    if not text or len(text) > MOST_TEXT:
        return None
    try:
        return _as_webp(base64.b64decode(text.rpartition(",")[2], validate=True), side)
    except (binascii.Error, ValueError):
        return None


def _as_webp(data: bytes, side: int) -> bytes | None:
    try:
        with Image.open(bytes_io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                return None
            small = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception:  # PIL raises many kinds of exceptions for damaged files
        return None
    small.thumbnail((side, side))
    file = bytes_io.BytesIO()
    small.save(file, "WEBP", quality=85)
    return file.getvalue()
