"""Subjects and prompts: held-out objects of the demo, reference scenes, scenes to ask for.

Import only after the demo is importable (`bench.host.use_demo`).
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from demo.base.artwork import Artwork, objects, views_of
from demo.base.scenes import WORDINGS, Scene, caption, random_scene, render

PLACEHOLDER = "sainj"
SEED = 20_261
PROMPTS = 25
REFERENCES = 4
SWEEP = 3  # subjects for choosing learning rates, never scored in a table
TABLE = 40  # the largest table's


class Settings(NamedTuple):
    """Settings that are the same for all methods."""

    steps: int
    batch: int
    sampler_steps: int
    cfg: float
    sampler: str = "euler"
    scheduler: str = "normal"
    seed: int = 0


class Subject(NamedTuple):
    """One object to learn: reference scenes, and scenes to ask for."""

    artwork: Artwork
    references: tuple[Scene, ...]
    prompts: tuple[Scene, ...]
    unseen: tuple[Scene, ...]  # real scenes of it, for the target embedding

    @property
    def phrase(self) -> str:
        return f"{PLACEHOLDER} {self.artwork.class_word}"

    def pictures(self) -> list[Image.Image]:
        return [render(scene) for scene in self.references]

    def captions(self, word: str) -> list[str]:
        """Captions of the reference scenes, in various wordings."""
        return [caption(scene, index % len(WORDINGS), word) for index, scene in enumerate(self.references)]

    def prompt_texts(self, word: str) -> list[str]:
        return texts_of(self.prompts, word)


def moved(scenes: tuple[Scene, ...]) -> tuple[Scene, ...]:
    """The same scenes with shift and stretch, which captions do not describe."""
    rng = np.random.RandomState(SEED + 2)
    others = [random_scene(rng, (scene.artwork,)) for scene in scenes]
    return tuple(
        scene._replace(shift_x=other.shift_x, shift_y=other.shift_y, stretch=other.stretch)
        for scene, other in zip(scenes, others, strict=True)
    )


def texts_of(scenes: tuple[Scene, ...], word: str | None) -> list[str]:
    """A prompt for each scene, with changing wordings. None: each object's own word."""
    return [caption(scene, index % len(WORDINGS), word) for index, scene in enumerate(scenes)]


def make_subject(artwork: Artwork, references: int = REFERENCES, prompts: int = PROMPTS) -> Subject:
    """References are scenes with shift and stretch. Prompts are other combinations of size, side, colour and pattern.

    With more references, the first ones stay the same, and the prompts do not change.
    """
    rng = np.random.RandomState((SEED + number_of(artwork)) % 2**32)
    shown = distinct(rng, artwork, 8, ())
    asked = distinct(rng, artwork, PROMPTS, shown)
    unseen = tuple(random_scene(rng, views_of(artwork)) for _ in range(8))
    plain = tuple(scene._replace(shift_x=0.0, shift_y=0.0, stretch=1.0) for scene in asked)
    return Subject(artwork, shown[:references], plain[:prompts], unseen)


def number_of(artwork: Artwork) -> int:
    """The seed of a subject: of emoji the character's number, else a checksum of the word."""
    is_emoji = artwork.vendor in ("google", "twitter")
    return int(artwork.file.split("-")[0], 16) if is_emoji else zlib.crc32(artwork.word.encode())


def distinct(rng: np.random.RandomState, artwork: Artwork, count: int, taken: tuple[Scene, ...]) -> tuple[Scene, ...]:
    """Random scenes with different captions, and none with a caption of `taken`."""
    said = {factors(scene) for scene in taken}
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(rng, views_of(artwork))
        if factors(scene) not in said:
            said.add(factors(scene))
            found.append(scene)
    return tuple(found)


def factors(scene: Scene) -> tuple[str, str, str, str]:
    return scene.size, scene.side, scene.colour, scene.pattern


def shuffled_artworks() -> list[Artwork]:
    """Held-out objects in a fixed order: `SWEEP` for choosing, `TABLE` for tables, the rest for choosing. If an object
    is drawn from several sides, its first drawing.
    """
    held_out = list({artwork.word: artwork for artwork in reversed(objects("held_out"))}.values())[::-1]
    return [held_out[i] for i in np.random.RandomState(SEED).permutation(len(held_out))]


def sweep_artworks() -> list[Artwork]:
    return choice_artworks(SWEEP)


def choice_artworks(count: int) -> list[Artwork]:
    shuffled = shuffled_artworks()
    return (shuffled[:SWEEP] + shuffled[SWEEP + TABLE :])[:count]


def table_artworks(count: int) -> list[Artwork]:
    return shuffled_artworks()[SWEEP : SWEEP + count]


def base_object_scenes(count: int) -> tuple[Scene, ...]:
    """Base objects in scenes that every method is asked for, to measure forgetting."""
    rng = np.random.RandomState(SEED + 1)
    scenes = [random_scene(rng) for _ in range(count)]
    return tuple(scene._replace(shift_x=0.0, shift_y=0.0, stretch=1.0) for scene in scenes)
