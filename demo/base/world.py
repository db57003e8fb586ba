"""A small world whose truth is known: one object at a size, on a side, before a background of some colour and pattern.

A `Scene` is the truth, `render` draws it and `caption` says it; chance comes from the generator they are given.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from .artwork import Artwork, drawing, objects

IMAGE_SIZE: int = 128
SIZES: dict[str, float] = {"small": 0.42, "large": 0.66}  # longest side of the drawing / image side
SIDES: dict[str, float] = {"left": 0.35, "right": 0.65}  # centre of the drawing / image side
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 50, 46),
    "yellow": (246, 214, 70),
    "green": (62, 156, 72),
    "cyan": (104, 212, 222),
    "blue": (48, 78, 186),
    "purple": (132, 62, 158),
    "pink": (248, 168, 196),
    "gray": (124, 126, 130),
}
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted")
PATTERN_SHADE: float = 0.78
JITTER: float = 0.04  # of the image side, each way
STRETCH: float = 0.06  # of the object's size, each way
WORDINGS: tuple[str, ...] = (
    "a {size} {word} on the {side}, {background} background",
    "a {size} {word} on the {side} side, {background} background",
    "a picture of a {size} {word} on the {side}, on a {background} background",
    "{size} {word}, {side}, {background} background",
    "on a {background} background, a {size} {word} on the {side}",
)


class Scene(NamedTuple):
    """Everything a picture shows: what captions say, then the nuisances they leave out."""

    artwork: Artwork
    size: str
    side: str
    colour: str
    pattern: str
    shift_x: float = 0.0
    shift_y: float = 0.0
    stretch: float = 1.0


def random_scene(rng: np.random.RandomState, artworks: tuple[Artwork, ...] | None = None) -> Scene:
    """A scene with every factor drawn uniformly, but plain backgrounds as often as the two patterns together."""
    artworks = artworks or objects("base")
    return Scene(
        artwork=artworks[rng.randint(len(artworks))],
        size=list(SIZES)[rng.randint(len(SIZES))],
        side=list(SIDES)[rng.randint(len(SIDES))],
        colour=list(COLOURS)[rng.randint(len(COLOURS))],
        pattern=PATTERNS[max(0, rng.randint(4) - 1)],
        shift_x=rng.uniform(-JITTER, JITTER),
        shift_y=rng.uniform(-2 * JITTER, 2 * JITTER),
        stretch=rng.uniform(1 - STRETCH, 1 + STRETCH),
    )


def background(colour: str, pattern: str, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Background alone. -> (h, w, 3) uint8"""
    y, x = (np.mgrid[0:image_size, 0:image_size] + 0.5) * (128 / image_size)
    if pattern == "striped":
        is_shaded = (y // 16) % 2 == 1
    elif pattern == "dotted":
        is_shaded = (x % 32 - 16) ** 2 + (y % 32 - 16) ** 2 < 8**2
    else:
        is_shaded = np.zeros_like(x, dtype=bool)
    shade = np.where(is_shaded, PATTERN_SHADE, 1.0)[..., None]
    return (np.array(COLOURS[colour]) * shade).round().astype(np.uint8)


def box(scene: Scene, image_size: int = IMAGE_SIZE) -> tuple[int, int, int, int]:
    """Where the drawing lies, in pixels: left, top, right, bottom."""
    picture = drawing(scene.artwork)
    scale = image_size * SIZES[scene.size] * scene.stretch / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    left = round(image_size * (SIDES[scene.side] + scene.shift_x) - width / 2)
    top = round(image_size * (0.5 + scene.shift_y) - height / 2)
    return left, top, left + width, top + height


def render(scene: Scene, image_size: int = IMAGE_SIZE) -> Image.Image:
    """The scene as an RGB picture."""
    canvas = Image.fromarray(background(scene.colour, scene.pattern, image_size))
    left, top, right, bottom = box(scene, image_size)
    picture = drawing(scene.artwork).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    canvas.paste(picture, (left, top), picture)
    return canvas


def caption(scene: Scene, wording: int = 0, word: str | None = None) -> str:
    """The scene in words; `word` stands in for the object's own name."""
    is_plain = scene.pattern == "plain"
    return WORDINGS[wording].format(
        size=scene.size,
        word=word or scene.artwork.word,
        side=scene.side,
        background=scene.colour if is_plain else f"{scene.pattern} {scene.colour}",
    )
