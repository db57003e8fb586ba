"""The shipped pictures are those that the code draws, and they leave combinations for prompts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sa_inject.demo.base.artwork import find, objects
from sa_inject.demo.base.scenes import caption, render
from sa_inject.demo.subjects.draw import PLACEHOLDER_TOKEN, SUBJECT, main, reference_scenes

FOLDER = Path(main.__code__.co_filename).parent / SUBJECT


def test_there_is_a_picture_and_a_caption_for_each_scene():
    numbers = [f"{i:02}" for i in range(1, len(reference_scenes()) + 1)]
    for kind in ("png", "txt"):
        assert sorted(path.stem for path in FOLDER.glob(f"*.{kind}")) == numbers


def test_the_subject_is_held_out():
    assert find(SUBJECT) not in objects("base")


@pytest.mark.usefixtures("artwork")
def test_the_shipped_pictures_are_drawn_from_their_scenes():
    for number, scene in enumerate(reference_scenes(), start=1):
        shipped, drawn = Image.open(FOLDER / f"{number:02}.png"), render(scene)
        assert shipped.mode == "RGB" and shipped.size == drawn.size
        assert np.abs(np.asarray(shipped).astype(int) - np.asarray(drawn)).max() <= 2  # Pillows round differently


def test_the_shipped_captions_say_what_the_scenes_show_and_use_the_placeholder():
    for number, scene in enumerate(reference_scenes(), start=1):
        text = (FOLDER / f"{number:02}.txt").read_text().strip()
        assert text == caption(scene, word=f"{PLACEHOLDER_TOKEN} toy")
        assert SUBJECT not in text


def test_the_pictures_show_both_sizes_and_sides_but_no_colour_that_prompts_ask_for():
    scenes = reference_scenes()
    assert {scene.size for scene in scenes} == {"small", "large"} and {s.side for s in scenes} == {"left", "right"}
    assert not {scene.colour for scene in scenes} & {"red", "cyan", "purple"}
