"""Join sample pictures into one: a row for each step, a column for each prompt."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

SIDE = 256  # pixels of the longer side of a picture
LABEL = 16  # pixels above each row, for its step


def contact_sheet(rows: Sequence[tuple[int, Sequence[Image.Image]]]) -> Image.Image:
    """rows: for each, the number of the step and its pictures"""
    small = [(step, [_shrunk(picture) for picture in pictures]) for step, pictures in rows]
    width = max(picture.width for _, pictures in small for picture in pictures)
    height = max(picture.height for _, pictures in small for picture in pictures)
    columns = max(len(pictures) for _, pictures in small)
    sheet = Image.new("RGB", (columns * width, len(small) * (height + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (step, pictures) in enumerate(small):
        top = row * (height + LABEL)
        draw.text((2, top + 2), f"step {step}", fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (column * width, top + LABEL))
    return sheet


def _shrunk(picture: Image.Image) -> Image.Image:
    copy = picture.copy()
    copy.thumbnail((SIDE, SIDE))
    return copy
