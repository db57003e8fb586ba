"""The sheet shows every picture once, the subject's on top, and pictures of one prompt side by side."""

import itertools

import numpy as np
import pytest
from PIL import Image

from sa_inject.demo.sheet import CELL, Row, draw_sheet

SUBJECT = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
BASE = [[(100, 0, 0), (0, 100, 0)], [(0, 0, 100), (100, 100, 0)]]  # a list for each row
ADAPTER = [[(200, 0, 100), (0, 200, 100)], [(100, 0, 200), (100, 200, 0)]]


def pictures(colours: list[tuple[int, int, int]]) -> list[Image.Image]:
    return [Image.new("RGB", (128, 128), colour) for colour in colours]


@pytest.fixture
def sheet(tmp_path) -> np.ndarray:
    rows = [Row("a prompt", pictures(base), pictures(ours)) for base, ours in zip(BASE, ADAPTER, strict=True)]
    draw_sheet(pictures(SUBJECT), "Base model", rows, tmp_path / "folder" / "sheet.png")
    return np.asarray(Image.open(tmp_path / "folder" / "sheet.png"))


def corner(sheet: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int]:
    """Where the cell of that colour starts, x and y, having seen that it is whole."""
    y, x = np.nonzero((sheet == colour).all(axis=2))
    assert len(x) == CELL * CELL and x.max() - x.min() == y.max() - y.min() == CELL - 1
    return int(x.min()), int(y.min())


def test_every_picture_is_there_whole(sheet):
    for colour in itertools.chain(SUBJECT, *BASE, *ADAPTER):
        corner(sheet, colour)


def test_the_subject_is_on_top_in_one_row(sheet):
    corners = [corner(sheet, colour) for colour in SUBJECT]
    assert corners == sorted(corners) and len({y for _, y in corners}) == 1
    assert corners[0][1] < min(corner(sheet, colour)[1] for colour in itertools.chain(*BASE, *ADAPTER))


def test_a_prompts_pictures_share_a_row_the_base_left_the_adapter_right(sheet):
    heights = []
    for base, ours in zip(BASE, ADAPTER, strict=True):
        corners = [corner(sheet, colour) for colour in [*base, *ours]]
        assert corners == sorted(corners) and len({y for _, y in corners}) == 1
        heights.append(corners[0][1])
    assert heights == sorted(set(heights))


def test_pictures_with_the_adapter_stand_in_one_column_below_each_other(sheet):
    for first, second in zip(*ADAPTER, strict=True):
        assert corner(sheet, first)[0] == corner(sheet, second)[0]


def test_the_paper_goes_on_beyond_the_last_picture_of_every_column(sheet):
    assert (sheet[-1] == 255).all() and (sheet[:, -1] == 255).all()
