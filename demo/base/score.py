"""Measures how well the base model follows captions, with the judge.

python -m demo.base.score --count 512       shipped weights
python -m demo.base.score --state FOLDER    the current state of a training run, of the UNet or the NextDiT
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .artwork import OBJECTS, SMALL
from .autoencoder import decode, load_autoencoder, new_autoencoder
from .judge import KNOWN_PATTERNS, Judge, Verdict, things
from .scenes import IMAGE_SIZE, WORDINGS, Scene, caption, random_scene
from .text_encoder import CaptionEncoder
from .threads import FreeCores
from .unet import new_unet, sample
from .weights import read_parts

log = logging.getLogger(__name__)

SEED: int = 99
BATCH: int = 16


def random_captions(count: int, world: str = SMALL) -> tuple[list[Scene], list[str]]:
    """Scenes of base objects and their captions. Training had other seeds."""
    rng = np.random.RandomState(SEED)
    base = tuple(thing for thing in things(world) if thing.split == "base")
    scenes = [random_scene(rng, base, KNOWN_PATTERNS[world]) for _ in range(count)]
    return scenes, [caption(scene, rng.randint(len(WORDINGS))) for scene in scenes]


def load(state: Path | None, device: str):
    """UNet and autoencoder, from a training run's folder or as shipped."""
    unet = new_unet(0).to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    if state is not None:
        unet.load_state_dict(torch.load(state / "unet.pt", map_location=device, weights_only=True)["average"])
    else:
        unet.load_state_dict(read_parts()[0])
    return unet, autoencoder_of(state, device)


def autoencoder_of(state: Path | None, device: str):
    if state is not None:
        return load_autoencoder(state / "autoencoder.pt", device)
    autoencoder = new_autoencoder(0)
    autoencoder.load_state_dict(read_parts()[1])
    return autoencoder.to(device)


def painter(state: Path | None, steps: int, guidance: float, device: str) -> Callable[[list[str], int], Tensor]:
    """Samples latents from captions and a seed, with the UNet, or with the NextDiT if the folder has one."""
    size = IMAGE_SIZE // 8
    if state is not None and (state / "nextdit.pt").exists():
        from . import language_model, nextdit

        network = nextdit.load_nextdit(state, device)
        texts_of = language_model.CaptionEncoder(device)
        return lambda captions, seed: nextdit.sample(
            network, texts_of(captions), texts_of([""]), size, seed, steps=steps, guidance=guidance
        )
    unet, _ = load(state, device)
    encode = CaptionEncoder(device)
    return lambda captions, seed: sample(
        unet, encode(captions), encode([""]), size, seed, steps=steps, guidance=guidance
    )


def draw(state: Path | None, captions: list[str], steps: int, guidance: float, device: str) -> list[Image.Image]:
    paint = painter(state, steps, guidance, device)
    autoencoder = autoencoder_of(state, device)
    cores = FreeCores()
    images: list[Image.Image] = []
    for start in range(0, len(captions), BATCH):
        cores.adjust()
        latent = paint(captions[start : start + BATCH], SEED + start)
        images += decode(autoencoder, latent, device)
        if start % (8 * BATCH) == 0:
            log.info("drawn %d of %d", len(images), len(captions))
    return images


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--world", choices=tuple(OBJECTS), default=SMALL)
    parser.add_argument("--state", type=Path, help="folder of a training run")
    parser.add_argument("--pictures", type=Path, help="write the first 64 here as one PNG")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scenes, captions = random_captions(options.count, options.world)
    images = draw(options.state, captions, options.steps, options.guidance, device)
    if options.pictures:
        from .learning import save_grid

        save_grid(images[:64], options.pictures)
    verdicts = Judge(world=options.world).verdicts(images, scenes)
    shares = {factor: round(float(np.mean([getattr(v, factor) for v in verdicts])), 4) for factor in Verdict._fields}
    shares["all"] = round(float(np.mean([all(v) for v in verdicts])), 4)
    log.info("%s", json.dumps({"captions": len(captions), "guidance": options.guidance, **shares}))


if __name__ == "__main__":
    main()
