"""A scene's picture and its caption have the same content."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sa_inject.demo.base.artwork import catalogue, find, objects
from sa_inject.demo.base.scenes import (
    COLOURS,
    JITTER,
    PATTERN_SHADE,
    PATTERNS,
    SIDES,
    SIZES,
    STRETCH,
    WORDINGS,
    Scene,
    background,
    box,
    caption,
    random_scene,
    render,
)

FACTORS = [SIZES, SIDES, COLOURS, PATTERNS]
OBJECT_WORDS = {word for artwork in catalogue() for word in (artwork.word, artwork.class_word)}
VOCABULARY = {*SIZES, *SIDES, *COLOURS, *PATTERNS, *OBJECT_WORDS}
EVERY_WORDING = pytest.mark.parametrize("wording", range(len(WORDINGS)))
OF_ALL_SHAPES = ("guitar", "snake", "giraffe", "sun", "robot", "skateboard")  # wide, tall, round; base and held-out


def scenes(word: str = "guitar") -> list[Scene]:
    return [Scene(find(word), *factors) for factors in itertools.product(*FACTORS)]


def mentioned(text: str) -> set[str]:
    """Which of the world's words are in a text, longest first, so that "tennis ball" does not mention a ball."""
    pattern = "|".join(re.escape(word) for word in sorted(VOCABULARY, key=len, reverse=True))
    return set(re.findall(rf"\b(?:{pattern})\b", text))


def said_by(scene: Scene) -> set[str]:
    return {scene.size, scene.side, scene.colour, scene.pattern} - {"plain"}


# --- Captions


@EVERY_WORDING
def test_a_caption_mentions_every_factor_of_its_scene_and_no_other(wording):
    for scene in scenes():
        assert mentioned(caption(scene, wording)) == said_by(scene) | {"guitar"}


@EVERY_WORDING
def test_a_caption_mentions_its_object_and_no_other(wording):
    for scene in (random_scene(np.random.RandomState(i), (artwork,)) for i, artwork in enumerate(catalogue())):
        assert mentioned(caption(scene, wording)) == said_by(scene) | {scene.artwork.word}


@EVERY_WORDING
def test_a_pattern_belongs_to_the_colour_of_the_background(wording):
    (scene,) = [s for s in scenes() if s[1:5] == ("small", "left", "pink", "dotted")]
    assert "dotted pink background" in caption(scene, wording)
    assert "pink background" in caption(scene._replace(pattern="plain"), wording)


@EVERY_WORDING
def test_a_caption_with_another_word_keeps_the_objects_name_to_itself(wording):
    for scene in scenes():
        text = caption(scene, wording, word="sainj toy")
        assert "sainj toy" in text and mentioned(text) == said_by(scene) | {"toy"}


def test_scenes_that_differ_have_different_captions_in_every_wording():
    captions = [caption(scene, wording) for scene in scenes() for wording in range(len(WORDINGS))]
    assert len(set(captions)) == len(captions)


# --- Backgrounds


@pytest.mark.parametrize("colour", COLOURS)
def test_a_plain_background_is_its_colour_all_over(colour):
    assert np.unique(background(colour, "plain").reshape(-1, 3), axis=0).tolist() == [list(COLOURS[colour])]


@pytest.mark.parametrize("pattern", ["striped", "dotted"])
def test_a_pattern_is_the_colour_and_a_darker_shade_of_it(pattern):
    bright = np.array(COLOURS["cyan"])
    shades = np.unique(background("cyan", pattern).reshape(-1, 3), axis=0).tolist()
    assert shades == [(bright * PATTERN_SHADE).round().astype(int).tolist(), bright.tolist()]


def test_stripes_run_from_side_to_side_and_dots_do_not():
    striped, dotted = background("red", "striped"), background("red", "dotted")
    assert (striped == striped[:, :1]).all() and (striped[0] != striped[16]).all()
    assert (dotted != dotted[:, :1]).any() and (dotted != dotted[:1]).any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_smaller_picture_has_the_same_background_in_fewer_pixels(pattern):
    small, large = background("green", pattern, 64), Image.fromarray(background("green", pattern, 128))
    shrunk = np.asarray(large.resize((64, 64), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - shrunk).mean() < 2


# --- Pictures


def drawn_box(scene: Scene, image_size: int) -> tuple[int, int, int, int]:
    """Around all pixels that are not background."""
    differs = np.asarray(render(scene, image_size)) != background(scene.colour, scene.pattern, image_size)
    rows, columns = (np.flatnonzero(differs.any(axis=axis)) for axis in ((1, 2), (0, 2)))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.usefixtures("artwork")
@pytest.mark.parametrize("image_size", [64, 128])
@pytest.mark.parametrize("word", OF_ALL_SHAPES)
def test_the_object_fills_the_box_and_nothing_beyond(word, image_size):
    for size, side, colour in itertools.product(SIZES, SIDES, ("red", "gray")):
        scene = Scene(find(word), size, side, colour, "plain", shift_x=0.02, shift_y=-0.03, stretch=1.05)
        expected = np.clip(box(scene, image_size), 0, image_size)
        assert np.abs(np.array(drawn_box(scene, image_size)) - expected).max() <= image_size // 32


@pytest.mark.usefixtures("artwork")
@pytest.mark.parametrize("side", SIDES)
def test_the_object_is_on_the_side_that_the_scene_says_and_half_way_down(side):
    rng = np.random.RandomState(0)
    for artwork in catalogue():
        left, top, right, bottom = box(random_scene(rng, (artwork,))._replace(side=side))
        assert ("left" if (left + right) / 2 < 64 else "right") == side
        assert abs((left + right) / 2 / 128 - SIDES[side]) < JITTER + 0.01
        assert abs((top + bottom) / 2 / 128 - 0.5) < 2 * JITTER + 0.01


@pytest.mark.usefixtures("artwork")
@pytest.mark.parametrize("size", SIZES)
def test_the_objects_longer_side_has_the_share_of_the_picture_that_its_size_says(size):
    rng = np.random.RandomState(1)
    for artwork in catalogue():
        left, top, right, bottom = box(random_scene(rng, (artwork,))._replace(size=size))
        share = max(right - left, bottom - top) / 128
        assert abs(share / SIZES[size] - 1) < STRETCH + 0.01


@pytest.mark.usefixtures("artwork")
def test_no_object_is_stretched_out_of_shape():
    for word in OF_ALL_SHAPES:
        large, small = (box(Scene(find(word), size, "left", "red", "plain"), 512) for size in ("large", "small"))
        shapes = [(right - left) / (bottom - top) for left, top, right, bottom in (large, small)]
        assert shapes[0] == pytest.approx(shapes[1], rel=0.03)


# --- Chance


def test_the_same_seed_gives_the_same_scenes():
    first, again, other = ([random_scene(rng) for _ in range(20)] for rng in map(np.random.RandomState, (5, 5, 6)))
    assert first == again != other


def test_scenes_show_base_objects_unless_others_are_asked_for():
    rng = np.random.RandomState(2)
    shown = {random_scene(rng).artwork for _ in range(3000)}
    assert shown == set(objects("base"))
    assert random_scene(rng, (find("robot"),)).artwork == find("robot")


def test_factors_are_drawn_evenly_and_half_of_the_backgrounds_are_plain():
    rng = np.random.RandomState(3)
    drawn = [random_scene(rng) for _ in range(8000)]
    for field, expected in {
        "size": dict.fromkeys(SIZES, 1 / 2),
        "side": dict.fromkeys(SIDES, 1 / 2),
        "colour": dict.fromkeys(COLOURS, 1 / 8),
        "pattern": {"plain": 1 / 2, "striped": 1 / 4, "dotted": 1 / 4},
    }.items():
        counts = Counter(getattr(scene, field) for scene in drawn)
        assert {value: count / len(drawn) for value, count in counts.items()} == pytest.approx(expected, abs=0.02)
