"""Draws the reference pictures of the demo's subject, with captions: a robot that the base model never saw.

    python -m demo.subjects.draw

Red, cyan and purple backgrounds are left out on purpose: the demo's prompts ask for them.
"""

from pathlib import Path

import numpy as np

from ..base.artwork import find
from ..base.scenes import Scene, caption, random_scene, render

SUBJECT: str = "robot"
PLACEHOLDER_TOKEN: str = "sainj"
SCENES: tuple[tuple[str, str, str, str], ...] = (
    ("large", "right", "blue", "plain"),
    ("small", "left", "green", "plain"),
    ("large", "left", "yellow", "striped"),
    ("small", "right", "pink", "plain"),
    ("large", "left", "gray", "plain"),
)


def reference_scenes() -> list[Scene]:
    artwork = find(SUBJECT)
    rng = np.random.RandomState(1)
    names = ("size", "side", "colour", "pattern")
    return [random_scene(rng, (artwork,))._replace(**dict(zip(names, factors, strict=True))) for factors in SCENES]


def main() -> None:
    folder = Path(__file__).parent / SUBJECT
    folder.mkdir(exist_ok=True)
    for number, scene in enumerate(reference_scenes(), start=1):
        render(scene).save(folder / f"{number:02}.png", optimize=True)
        word = f"{PLACEHOLDER_TOKEN} {scene.artwork.class_word}"
        (folder / f"{number:02}.txt").write_text(caption(scene, word=word) + "\n")


if __name__ == "__main__":
    main()
