"""The demo's result sheet: the subject, pictures of the base model, and pictures with the adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL = 256, 12, 34
PAPER, INK, FAINT = "#ffffff", "#222222", "#777777"


class Row(NamedTuple):
    prompt: str
    base: Sequence[Image.Image]
    adapter: Sequence[Image.Image]


def draw_sheet(subject: Sequence[Image.Image], base_name: str, rows: Sequence[Row], path: Path) -> None:
    """The subject's pictures on top. Below, for every prompt, the base model's pictures left, the adapter's right."""
    half = max(len(row.base) for row in rows)
    columns = max(2 * half, len(subject))
    width = GAP + columns * (CELL + GAP)
    height = (LABEL + GAP) * (len(rows) + 1) + LABEL + (CELL + GAP) * (len(rows) + 1) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)

    y = GAP
    _text(pen, GAP, y, "The subject: the pictures that the adapter was trained on", INK)
    y += LABEL
    _pictures(sheet, subject, GAP, y)
    y += CELL + GAP
    right = GAP + half * (CELL + GAP)
    _text(pen, GAP, y, base_name, INK)
    _text(pen, right, y, "With the adapter, same seeds", INK)
    y += LABEL
    for row in rows:
        _text(pen, GAP, y, row.prompt, FAINT)
        y += LABEL
        _pictures(sheet, row.base, GAP, y)
        _pictures(sheet, row.adapter, right, y)
        y += CELL + GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.crop((0, 0, width, y)).save(path)


def _pictures(sheet: Image.Image, pictures: Sequence[Image.Image], x: int, y: int) -> None:
    for index, picture in enumerate(pictures):
        cell = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(cell, (x + index * (CELL + GAP), y))


def _text(pen: ImageDraw.ImageDraw, x: int, y: int, words: str, colour: str) -> None:
    pen.text((x, y + 4), words, fill=colour, font=ImageFont.load_default(size=18))
