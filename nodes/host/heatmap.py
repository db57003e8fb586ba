"""Heat maps over pictures, with a legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Five colours of matplotlib's viridis, from dark to light. They differ for colour-blind people, too.
COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32)
LEAST_OVERLAY, MOST_OVERLAY = 0.25, 0.85
CELL = 384  # pixels
LINE = 26
GAP = 8
PAPER, INK = (28, 28, 30), (235, 235, 235)


def overlay(picture: Image.Image, values: Tensor, highest: float) -> Image.Image:
    """Draw values (h, w) from 0 to `highest` over a grey picture. High values are light and opaque."""
    picture = enlarged(picture).convert("L").convert("RGB")
    share = np.clip(values.numpy() / max(highest, 1e-12), 0, 1).astype(np.float32)
    size = picture.size
    alpha = Image.fromarray((LEAST_OVERLAY + (MOST_OVERLAY - LEAST_OVERLAY) * share) * 255).convert("L")
    colours = Image.fromarray(_colours(share))
    return Image.composite(
        colours.resize(size, Image.Resampling.BICUBIC), picture, alpha.resize(size, Image.Resampling.BICUBIC)
    )


def marked(picture: Image.Image, point: tuple[float, float]) -> Image.Image:
    """Draw a ring at a point: (x, y) as shares of width and height."""
    picture = enlarged(picture)
    x, y, r = point[0] * picture.width, point[1] * picture.height, max(6, picture.width // 40)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((x - r, y - r, x + r, y + r), outline=(0, 0, 0), width=5)
    draw.ellipse((x - r, y - r, x + r, y + r), outline=(255, 255, 255), width=2)
    return picture


def enlarged(picture: Image.Image) -> Image.Image:
    """A copy whose longer side has CELL pixels."""
    ratio = CELL / max(picture.size)
    return picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.BICUBIC)


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], title: str, legend: str, highest: str) -> Image.Image:
    """Pictures with a line of text above each, and the legend below, from 0 to `highest`."""
    wide = max(len(row) for row in rows) * (CELL + GAP) + GAP
    tall = LINE + GAP + len(rows) * (LINE + CELL + GAP) + 3 * LINE
    made = Image.new("RGB", (wide, tall), PAPER)
    draw = ImageDraw.Draw(made)
    font = ImageFont.load_default(15)
    draw.text((GAP, GAP), title, INK, font)
    for number, row in enumerate(rows):
        top = LINE + GAP + number * (LINE + CELL + GAP)
        for index, (text, picture) in enumerate(row):
            left = GAP + index * (CELL + GAP)
            draw.text((left, top + 4), text, INK, font)
            made.paste(picture, (left, top + LINE))
    top = tall - 2 * LINE
    bar = Image.fromarray(_colours(np.linspace(0, 1, 256, dtype=np.float32)[None])).resize((256, 14))
    made.paste(bar, (GAP + 24, top))
    draw.text((GAP, top - 3), "0", INK, font)
    draw.text((GAP + 24 + 262, top - 3), highest, INK, font)
    draw.text((GAP, top + 18), legend, INK, font)
    return made


def _colours(share: np.ndarray) -> np.ndarray:
    """(h, w) in 0..1 -> (h, w, 3) bytes"""
    steps = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(share, steps, COLOURS[:, channel]) for channel in range(3)], -1).astype(np.uint8)
