"""A classifier of the demo's scenes, trained on real scenes only.

Background, side and size are measured. The object is recognised by a small network. It is trained on real scenes of all
artwork, base and held-out, so it knows the subjects too. It is used in no other training.

    python -m demo.base.judge train     train the network again (minutes), into demo/base/judge.safetensors
    python -m demo.base.judge check     accuracy on real scenes that were not used for training

Both take `--world large` for the large set. Its judge is in the cache folder until it is shipped.
"""

import argparse
import logging
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .artwork import LARGE, OBJECTS, SHIPPED, SMALL, Artwork, cache_folder, catalogue
from .scenes import COLOURS, IMAGE_SIZE, MEASURABLE, PATTERNS, SIZES, Scene, background, box, random_scene, render
from .threads import FreeCores

log = logging.getLogger(__name__)

WEIGHTS: Path = Path(__file__).with_name("judge.safetensors")
SEED: int = 11
CROP: int = 48  # pixels of the network's input
MARGIN: float = 0.1  # around the found object, relative to its longer side
FOREGROUND_DISTANCE: float = 36.0  # RGB distance from the background above which a pixel belongs to the object
TOLERANCE: float = 80.0  # maximum distance that a pixel counts against a background
WIDTH: int = 128  # of an embedding
TEMPERATURE: float = 0.07
BATCH: int = 128
STEPS: dict[str, int] = {SMALL: 600, LARGE: 6000}
KNOWN_PATTERNS: dict[str, tuple[str, ...]] = {SMALL: PATTERNS, LARGE: MEASURABLE}
LEARNING_RATE: float = 3e-3
SAVE_SECONDS: float = 180


class Measured(NamedTuple):
    """What is measured without the network."""

    size: str
    side: str
    colour: str
    pattern: str
    box: tuple[int, int, int, int]  # left, top, right, bottom; the whole picture if no object is found


class Verdict(NamedTuple):
    """Which factors of a scene a picture shows correctly."""

    identity: bool
    size: bool
    side: bool
    colour: bool
    pattern: bool


def weights_file(world: str) -> Path:
    return WEIGHTS if world == SMALL else cache_folder() / f"judge_{world}.safetensors"


@cache
def things(world: str) -> tuple[Artwork, ...]:
    """The first drawing of every word. These are the classes."""
    return tuple({artwork.word: artwork for artwork in reversed(catalogue(world))}.values())[::-1]


@cache
def _backgrounds(patterns: tuple[str, ...]) -> tuple[list[tuple[str, str]], np.ndarray]:
    names = [(colour, pattern) for colour in COLOURS for pattern in patterns]
    return names, np.stack([background(*name) for name in names]).astype(np.float32)


def subject_mask(image: Image.Image, patterns: tuple[str, ...] = PATTERNS) -> tuple[str, str, np.ndarray]:
    """Find the background by template: its colour and pattern, and where the picture differs from it, (h, w) bool."""
    pixels = np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)), dtype=np.float32)
    names, templates = _backgrounds(patterns)
    coarse = np.sqrt(((templates[:, ::3, ::3] - pixels[::3, ::3]) ** 2).sum(-1))  # (templates, h/3, w/3)
    best = int(np.minimum(coarse, TOLERANCE).mean(axis=(1, 2)).argmin())
    colour, pattern = names[best]
    distance = np.sqrt(((templates[best] - pixels) ** 2).sum(-1))  # (h, w)
    found = Image.fromarray((distance > FOREGROUND_DISTANCE).astype(np.uint8) * 255)
    return colour, pattern, np.asarray(found.filter(ImageFilter.MedianFilter(5))) > 0


def measure(image: Image.Image, patterns: tuple[str, ...] = PATTERNS) -> Measured:
    """Measure the background, and side and size of the part that differs from it."""
    colour, pattern, found = subject_mask(image, patterns)
    rows, columns = np.flatnonzero(found.sum(1) > 1), np.flatnonzero(found.sum(0) > 1)
    if not len(rows) or not len(columns):
        return Measured("small", "left", colour, pattern, (0, 0, IMAGE_SIZE, IMAGE_SIZE))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    threshold = IMAGE_SIZE * sum(SIZES.values()) / 2
    size = "large" if max(right - left, bottom - top) > threshold else "small"
    side = "left" if (left + right) / 2 < IMAGE_SIZE / 2 else "right"
    return Measured(size, side, colour, pattern, (int(left), int(top), int(right), int(bottom)))


def crop_to_object(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Crop a square around `box`, at the network's size. Beyond the edge, the edge pixels are repeated."""
    left, top, right, bottom = box
    half = max(right - left, bottom - top) * (0.5 + MARGIN)
    x, y = (left + right) / 2, (top + bottom) / 2
    reach = IMAGE_SIZE
    padded = np.pad(np.asarray(image.convert("RGB")), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    area = (x - half + reach, y - half + reach, x + half + reach, y + half + reach)
    return Image.fromarray(padded).resize((CROP, CROP), Image.Resampling.BILINEAR, box=area)


class IdentityNetwork(nn.Module):
    """Unit embeddings of pictures of objects. Pictures of one object have similar embeddings."""

    def __init__(self, objects: int):
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        self.features = nn.Sequential(
            *(
                layer
                for before, after in zip(widths, widths[1:], strict=False)
                for layer in (nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU())
            )
        )
        self.project = nn.Linear(widths[-1] * 9, WIDTH)
        self.directions = nn.Parameter(torch.randn(objects, WIDTH))  # one per object, trained with the network

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, 48, 48) in -1..1 -> (b, WIDTH) of length 1"""
        return F.normalize(self.project(self.features(pixels).flatten(1)), dim=1)


def _blurred(image: Image.Image, rng: np.random.RandomState) -> Image.Image:
    """Blur and noise as of an autoencoder and a sampler, so that they do not change the result."""
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.8)))
    pixels = np.asarray(image, dtype=np.float32)
    pixels = (
        pixels * rng.uniform(0.9, 1.1, 3)
        + rng.uniform(-10, 10, 3)
        + rng.standard_normal(pixels.shape) * rng.uniform(0, 6)
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _view(artworks: tuple[Artwork, ...], patterns: tuple[str, ...], rng: np.random.RandomState) -> Image.Image:
    """The object, in any of its drawings, in a random scene, cropped about as well as `measure` does."""
    scene = random_scene(rng, artworks, patterns)
    found = tuple(int(edge) for edge in np.array(box(scene)) + rng.randint(-4, 5, size=4))
    return crop_to_object(_blurred(render(scene), rng), found)


def _to_input(images: list[Image.Image]) -> Tensor:
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_identity(path: Path, steps: int = STEPS[SMALL], world: str = SMALL) -> None:
    """Train with one learned direction per object (normalised softmax, Zhai and Wu, 2019).

    The state of an interrupted run is kept beside `path`, and resumed.
    """
    torch.manual_seed(SEED)
    artworks = [tuple(a for a in catalogue(world) if a.word == thing.word) for thing in things(world)]
    network = IdentityNetwork(len(artworks))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    learning = {"network": network, "optimizer": optimizer, "schedule": schedule}
    kept, done = path.with_suffix(".part"), 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        done = state["step"]
        for name, part in learning.items():
            part.load_state_dict(state[name])
    cores = FreeCores()
    started = saved = time.monotonic()
    for step in range(done + 1, steps + 1):
        cores.adjust()
        rng = np.random.RandomState(SEED * 1_000_003 + step)  # random numbers depend on the step only
        chosen = rng.randint(len(artworks), size=BATCH)
        embedded = network(_to_input([_view(artworks[i], KNOWN_PATTERNS[world], rng) for i in chosen]))
        cosine = embedded @ F.normalize(network.directions, dim=1).T  # (b, objects)
        loss = F.cross_entropy(cosine / TEMPERATURE, torch.from_numpy(chosen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log.info("judge %d/%d loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - started)
        if time.monotonic() - saved > SAVE_SECONDS:
            _save(kept, {"step": step} | {name: part.state_dict() for name, part in learning.items()})
            saved = time.monotonic()
    finished = path.with_suffix(".new")
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, finished)
    finished.replace(path)
    kept.unlink(missing_ok=True)


def _save(path: Path, state: dict) -> None:
    unfinished = path.with_suffix(".new")
    torch.save(state, unfinished)
    unfinished.replace(path)


class Judge:
    def __init__(self, path: Path | None = None, world: str = SHIPPED):
        path = path or weights_file(world)
        if not path.exists():
            raise FileNotFoundError(f"There is no {path.name}: run `python -m demo.base.judge train --world {world}`.")
        self._things, self._patterns = things(world), KNOWN_PATTERNS[world]
        self._network = IdentityNetwork(len(self._things))
        self._network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        self._network.eval().requires_grad_(False)

    def measure(self, image: Image.Image) -> Measured:
        return measure(image, self._patterns)

    @torch.inference_mode()
    def embed(self, images: list[Image.Image], seen: list[Measured] | None = None) -> Tensor:
        """Unit embeddings of the object in each picture, (b, WIDTH). `seen`: results of `measure`, if known."""
        seen = [self.measure(image) for image in images] if seen is None else seen
        return self._network(_to_input([crop_to_object(image, s.box) for image, s in zip(images, seen, strict=True)]))

    def rank(self, images: list[Image.Image]) -> list[list[Artwork]]:
        """All objects for each picture, the likeliest first."""
        return self.rank_embedded(self.embed(images))

    @torch.inference_mode()
    def rank_embedded(self, embedded: Tensor) -> list[list[Artwork]]:
        """The same for embeddings (b, WIDTH)."""
        cosine = embedded @ F.normalize(self._network.directions, dim=1).T
        return [[self._things[i] for i in order] for order in cosine.argsort(dim=1, descending=True).tolist()]

    def verdicts(self, images: list[Image.Image], scenes: list[Scene]) -> list[Verdict]:
        """Which factors each picture has in common with its scene."""
        seen = [self.measure(image) for image in images]
        ranked = self.rank_embedded(self.embed(images, seen))
        verdicts = []
        for measured, scene, (first, *_) in zip(seen, scenes, ranked, strict=True):
            factors = ("size", "side", "colour", "pattern")
            agreed = (getattr(measured, factor) == getattr(scene, factor) for factor in factors)
            verdicts.append(Verdict(first.word == scene.artwork.word, *agreed))
        return verdicts


def check(judge: Judge, count: int = 1000, world: str = SHIPPED) -> dict[str, float]:
    """Accuracy of each judgement on random real scenes."""
    rng = np.random.RandomState(SEED + 1)
    scenes = [random_scene(rng, catalogue(world), KNOWN_PATTERNS[world]) for _ in range(count)]
    verdicts = judge.verdicts([render(scene) for scene in scenes], scenes)
    return {factor: float(np.mean([getattr(v, factor) for v in verdicts])) for factor in Verdict._fields}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "check"))
    parser.add_argument("--world", choices=tuple(OBJECTS), default=SHIPPED)
    parser.add_argument("--steps", type=int, help=", ".join(f"{n} for {w}" for w, n in STEPS.items()))
    options = parser.parse_args()
    world = options.world
    if options.command == "train":
        train_identity(weights_file(world), options.steps or STEPS[world], world)
    log.info("%s", check(Judge(world=world), world=world))


if __name__ == "__main__":
    main()
