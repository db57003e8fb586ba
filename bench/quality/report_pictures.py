"""Pictures that the quality bench has drawn: where they are kept, and a sheet of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..host import CACHE
from .results import Result, by_method

GRID_SUBJECTS = 2
SHOWN = 6  # prompts whose first picture is kept to look at
CELL, LABEL, GAP = 96, 200, 4


def picture_file(part: str, method: str, subject: str) -> Path:
    """The folder for the first pictures of a result. Git ignores it."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{part} {method} {subject}".lower()).strip("-")
    return CACHE / "quality" / "pictures" / f"{name}.png"


def keep_pictures(part: str, method: str, subject: str, images: Sequence[Image.Image]) -> None:
    """Write the first of these pictures to `picture_file`."""
    path = picture_file(part, method, subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    strip(images[:SHOWN]).save(path)


def strip(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side."""
    joined = Image.new("RGB", ((CELL + GAP) * len(images) - GAP, CELL), "white")
    for index, image in enumerate(images):
        joined.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (index * (CELL + GAP), 0))
    return joined


def grid(results: Sequence[Result], path: Path) -> None:
    """The first prompts of the subjects with most methods' pictures on this machine. One row per method.

    Pictures are kept on the machine that drew them. On another machine, an existing sheet is not replaced.
    """
    from demo.base.artwork import find

    from .subjects import make_subject

    methods = by_method(results)
    files = {
        subject: {name: file for name in methods if (file := picture_file("main", name, subject)).exists()}
        for subject in dict.fromkeys(result["key"]["subject"] for result in results)
    }
    subjects = sorted(filter(files.get, files), key=lambda s: len(files[s]), reverse=True)[:GRID_SUBJECTS]
    if not subjects or (path.exists() and len(files[subjects[0]]) < len(methods)):
        return
    blocks = [[("the pictures learned from", strip(make_subject(find(subject)).pictures()))] for subject in subjects]
    for block, subject in zip(blocks, subjects, strict=True):
        block += [(name, Image.open(file)) for name, file in files[subject].items()]
    width = LABEL + max(row.width for block in blocks for _, row in block) + GAP
    height = sum(len(block) * (CELL + GAP) + 4 * GAP for block in blocks)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(size=13), 0
    for block in blocks:
        for name, row in block:
            pen.text((GAP, y + CELL // 2 - 8), name, fill="black", font=font)
            sheet.paste(row, (LABEL, y))
            y += CELL + GAP
        y += 4 * GAP
    sheet.save(path)
