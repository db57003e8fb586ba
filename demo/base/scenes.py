"""Scenes with known content: one object of some size, on one side, before a background of some colour and pattern.

A `Scene` lists the content, `render` draws it and `caption` describes it. Random numbers come from the generator that
they are given.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from .artwork import LARGE, Artwork, drawing, objects

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
MEASURABLE: tuple[str, ...] = (*PATTERNS, "gradient")  # those of the large set that the judge can distinguish
LARGE_PATTERNS: tuple[str, ...] = (*MEASURABLE, "blurred")
PATTERN_SHADE: float = 0.78
GRADIENT_SHADE: float = 0.5  # at the lower edge
PAIR_SHARE: float = 0.08  # of the large set's scenes, in which the object is shown twice
PAIR_SIDES: dict[str, float] = {"left": 0.27, "right": 0.73}
JITTER: float = 0.04  # of the image side, in both directions
STRETCH: float = 0.06  # of the object's size, in both directions
WORDINGS: tuple[str, ...] = (
    "a {size} {word} on the {side}, {background} background",
    "a {size} {word} on the {side} side, {background} background",
    "a picture of a {size} {word} on the {side}, on a {background} background",
    "{size} {word}, {side}, {background} background",
    "on a {background} background, a {size} {word} on the {side}",
)
PAIR_WORDINGS: tuple[str, ...] = (
    "a {size} {word} on the left and one more on the right, {background} background",
    "a {size} {word} on both sides, {background} background",
    "on a {background} background, a {size} {word} twice",
)


class Scene(NamedTuple):
    """The content of a picture: what captions describe, then what they leave out."""

    artwork: Artwork
    size: str
    side: str
    colour: str
    pattern: str
    shift_x: float = 0.0
    shift_y: float = 0.0
    stretch: float = 1.0
    is_pair: bool = False  # the same drawing on both sides; captions name this side
    backdrop: int = 0  # index of the blurred picture


def random_scene(
    rng: np.random.RandomState,
    artworks: tuple[Artwork, ...] | None = None,
    patterns: tuple[str, ...] = PATTERNS,
) -> Scene:
    """A random scene. All factors are uniform, but plain backgrounds are twice as likely as any pattern."""
    artworks = artworks or objects("base")
    return Scene(
        artwork=artworks[rng.randint(len(artworks))],
        size=list(SIZES)[rng.randint(len(SIZES))],
        side=list(SIDES)[rng.randint(len(SIDES))],
        colour=list(COLOURS)[rng.randint(len(COLOURS))],
        pattern=patterns[max(0, rng.randint(len(patterns) + 1) - 1)],
        shift_x=rng.uniform(-JITTER, JITTER),
        shift_y=rng.uniform(-2 * JITTER, 2 * JITTER),
        stretch=rng.uniform(1 - STRETCH, 1 + STRETCH),
    )


@cache
def _by_word(artworks: tuple[Artwork, ...]) -> tuple[tuple[Artwork, ...], ...]:
    found: dict[str, list[Artwork]] = {}
    for artwork in artworks:
        found.setdefault(artwork.word, []).append(artwork)
    return tuple(map(tuple, found.values()))


def random_large_scene(rng: np.random.RandomState, artworks: tuple[Artwork, ...] | None = None) -> Scene:
    """A random scene of the large set: words are uniform, with all drawings, more backgrounds, and some pairs."""
    words = _by_word(artworks or objects("base", LARGE))
    scene = random_scene(rng, words[rng.randint(len(words))], LARGE_PATTERNS)
    scene = scene._replace(backdrop=int(rng.randint(1 << 16)))
    return scene._replace(is_pair=True, size="small") if rng.rand() < PAIR_SHARE else scene


def _blurred(colour: str, backdrop: int, image_size: int) -> np.ndarray:
    """A blurred, tinted picture of several objects. -> (h, w, 3) uint8"""
    rng = np.random.RandomState(backdrop)
    side = 32
    canvas = Image.new("RGB", (side, side), tuple(int(c) for c in rng.randint(40, 216, 3)))
    artworks = objects("base", LARGE)
    for _ in range(6):
        picture = drawing(artworks[rng.randint(len(artworks))]).resize((20, 20))
        canvas.paste(picture, (int(rng.randint(-6, side - 10)), int(rng.randint(-6, side - 10))), picture)
    canvas = canvas.filter(ImageFilter.GaussianBlur(3)).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return (0.5 * np.asarray(canvas) + 0.5 * np.array(COLOURS[colour])).round().astype(np.uint8)


def background(colour: str, pattern: str, image_size: int = IMAGE_SIZE, backdrop: int = 0) -> np.ndarray:
    """Background alone. -> (h, w, 3) uint8"""
    if pattern == "blurred":
        return _blurred(colour, backdrop, image_size)
    y, x = (np.mgrid[0:image_size, 0:image_size] + 0.5) * (128 / image_size)
    if pattern == "gradient":
        shade = 1 - (1 - GRADIENT_SHADE) * y[..., None] / 128
        return (np.array(COLOURS[colour]) * shade).round().astype(np.uint8)
    if pattern == "striped":
        is_shaded = (y // 16) % 2 == 1
    elif pattern == "dotted":
        is_shaded = (x % 32 - 16) ** 2 + (y % 32 - 16) ** 2 < 8**2
    else:
        is_shaded = np.zeros_like(x, dtype=bool)
    shade = np.where(is_shaded, PATTERN_SHADE, 1.0)[..., None]
    return (np.array(COLOURS[colour]) * shade).round().astype(np.uint8)


def box(scene: Scene, image_size: int = IMAGE_SIZE) -> tuple[int, int, int, int]:
    """The bounding box of the drawing in pixels: left, top, right, bottom."""
    picture = drawing(scene.artwork)
    scale = image_size * SIZES[scene.size] * scene.stretch / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    centre = (PAIR_SIDES if scene.is_pair else SIDES)[scene.side]
    left = round(image_size * (centre + scene.shift_x) - width / 2)
    top = round(image_size * (0.5 + scene.shift_y) - height / 2)
    return left, top, left + width, top + height


def render(scene: Scene, image_size: int = IMAGE_SIZE) -> Image.Image:
    """Draw the scene as an RGB picture."""
    canvas = Image.fromarray(background(scene.colour, scene.pattern, image_size, scene.backdrop))
    sides = SIDES if scene.is_pair else (scene.side,)
    for side in sides:
        left, top, right, bottom = box(scene._replace(side=side), image_size)
        picture = drawing(scene.artwork).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        canvas.paste(picture, (left, top), picture)
    return canvas


def caption(scene: Scene, wording: int = 0, word: str | None = None) -> str:
    """Describe the scene. `word` replaces the object's own name."""
    is_plain = scene.pattern == "plain"
    wordings = PAIR_WORDINGS if scene.is_pair else WORDINGS
    return wordings[wording % len(wordings)].format(
        size=scene.size,
        word=word or scene.artwork.word,
        side=scene.side,
        background=scene.colour if is_plain else f"{scene.pattern} {scene.colour}",
    )
