"""Training of the demo's networks: steps, a moving average, checkpoints, and resuming."""

import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .artwork import SMALL, objects
from .muon import Muon
from .pool import Pool, make_pool
from .scenes import COLOURS, PATTERNS, SIDES, SIZES, Scene, caption
from .threads import FreeCores

log = logging.getLogger("train")

SEED: int = 7
WARMUP: int = 100
DECAY_SHARE: float = 0.3  # of all steps, at the end, in which the learning rate falls to 0
EMPTY_SHARE: float = 0.1  # of captions that are left out, for guidance
EMA_DECAY: float = 0.998
SAVE_SECONDS: float = 300
SAMPLE_STEPS: int = 200


class Stage(NamedTuple):
    """Training at one size of pictures."""

    image_size: int
    scenes: int
    batch: int
    steps: int


class Rates(NamedTuple):
    """Learning rates, and the parameters that Muon does not train: first and last layers, and costly ones."""

    adam: float
    muon: float
    adam_only: str  # a pattern for the start of a parameter's name


class Batch(NamedTuple):
    """The data of one step. Random numbers depend on the step only, so that a run can be resumed."""

    latent: Tensor  # (b, 4, h, w)
    captions: list[str]
    noise: Tensor  # (b, 4, h, w)
    fraction: Tensor  # (b,) fractions of the schedule, one from each of b equal slices, for less variance


class NetworkTraining(ABC):
    """The whole state of a run: network, its moving average, optimizers, and the number of the step."""

    kind: str  # part of the checkpoint's name and contents

    def __init__(self, folder: Path, device: str, network: nn.Module, average: nn.Module, rates: Rates):
        self.folder, self.device = folder, device
        self.network, self.average = network, average.requires_grad_(False).eval()
        named = list(network.named_parameters())
        is_matrix = {name: p.ndim > 1 and not re.match(rates.adam_only, name) for name, p in named}
        adam = torch.optim.AdamW(
            [p for name, p in named if not is_matrix[name]],
            lr=rates.adam,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        muon = Muon([p for name, p in named if is_matrix[name]], lr=rates.muon)
        self.optimizers: list[torch.optim.Optimizer] = [adam, muon]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.step = 0

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor: ...

    @abstractmethod
    def forget_captions(self) -> None:
        """Clear the cached captions, when those of another pool follow."""

    @abstractmethod
    def draw(self, captions: list[str], image_size: int, seed: int = 0) -> list[Image.Image]:
        """Pictures by the averaged network."""

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.kind}.pt"

    def save(self) -> None:
        partial = self.checkpoint.with_suffix(".part")
        state = {"step": self.step, self.kind: self.network.state_dict(), "average": self.average.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state[self.kind])
        self.average.load_state_dict(state["average"])
        if "optimizers" in state:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.step = state["step"]

    def batch(self, pool: Pool, size: int) -> Batch:
        rng = np.random.RandomState(SEED * 1_000_003 + self.step)
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + self.step)
        chosen = torch.from_numpy(rng.randint(len(pool.captions), size=size))
        captions = ["" if rng.rand() < EMPTY_SHARE else pool.captions[i] for i in chosen.tolist()]
        latent = pool.latents[chosen].float()
        noise = torch.randn(latent.shape, generator=generator).to(self.device)
        fraction = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        return Batch(latent.to(self.device), captions, noise, fraction.to(self.device))

    def learn(self, pool: Pool, batch: int, factor: float) -> float:
        """Take one step. `factor` scales the learning rates."""
        loss = self.loss(self.batch(pool, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        self.network.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        return loss.item()


def train(
    training: NetworkTraining, stages: tuple[Stage, ...], world: str = SMALL, minutes: float | None = None
) -> None:
    """Train until all stages are done, or for a number of minutes. Resumes from the checkpoint, if there is one."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    folder, device = training.folder, training.device
    workers = max(0, (os.cpu_count() or 1) - 2) if device == "cuda" else 0
    if training.checkpoint.exists():
        training.load()
        log.info("resumed at step %d", training.step)
    total = sum(stage.steps for stage in stages)
    saved = time.monotonic()
    end = 0
    cores = FreeCores()
    for stage in stages:
        end += stage.steps
        if training.step >= end:
            continue
        size = stage.image_size
        pool = make_pool(
            folder / f"pool-{size}.pt",
            folder / "autoencoder.pt",
            image_size=size,
            count=stage.scenes,
            seed=SEED + size,
            device=device,
            world=world,
            workers=workers,
        )
        training.forget_captions()
        losses: list[float] = []
        since = time.monotonic()
        while training.step < end:
            cores.adjust()
            losses.append(training.learn(pool, stage.batch, learning_rate_factor(training.step, total)))
            if training.step % 25 == 0:
                rate = len(losses) * stage.batch / (time.monotonic() - since)
                entry = {"step": training.step, "of": total, "size": size, "loss": round(float(np.mean(losses)), 5)}
                entry |= {"images_per_s": round(rate, 2), "threads": torch.get_num_threads()}
                log.info("%s %s", training.kind, json.dumps(entry))
                losses, since = [], time.monotonic()
            is_over = time.monotonic() > deadline
            if time.monotonic() - saved > SAVE_SECONDS or training.step == end or is_over:
                training.save()
                saved = since = time.monotonic()
                losses = []
            if training.step % SAMPLE_STEPS == 0 or training.step == end:
                images = training.draw(example_captions(16, world), size)
                save_grid(images, folder / f"sample-{training.step:06d}.png")
                losses, since = [], time.monotonic()
            if is_over:
                log.info("stopped at step %d of %d; the same command goes on", training.step, total)
                return


def learning_rate_factor(step: int, total: int) -> float:
    """Warm-up, constant, then linear decay to 0."""
    decay = max(1, round(DECAY_SHARE * total))
    return min(1.0, (step + 1) / WARMUP, max(0.0, (total - step) / decay))


def example_captions(count: int, world: str = SMALL) -> list[str]:
    """Captions of scenes with varying objects and factors."""
    artworks = objects("base", world)
    pick = list(SIZES), list(SIDES), list(COLOURS), PATTERNS
    scenes = [
        Scene(
            artworks[i * 37 % len(artworks)],
            *(options[i * 5 // (k + 1) % len(options)] for k, options in enumerate(pick)),
        )
        for i in range(count)
    ]
    return [caption(scene) for scene in scenes]


def save_grid(images: list[Image.Image], path: Path, columns: int = 8) -> None:
    side = images[0].width
    grid = Image.new("RGB", (side * columns, side * -(-len(images) // columns)))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * side, i // columns * side))
    grid.save(path)


def log_to(folder: Path | None) -> None:
    """Log to the terminal and to a file in the folder."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if folder is not None:
        handlers.append(logging.FileHandler(folder / "train.log"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True)


def status(folder: Path) -> None:
    lines = (folder / "train.log").read_text().splitlines()
    log.info("%s", "\n".join(lines[-5:]))
