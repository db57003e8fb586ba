"""Trains the demo's base model: autoencoder, then UNet on 64 px scenes, then on 128 px scenes.

    python -m demo.base.train run        start, or go on from the last checkpoint
    python -m demo.base.train decoder    then sharpen the autoencoder's decoder, which the UNet does not see
    python -m demo.base.train status     how far it is
    python -m demo.base.train export     write what has been learned so far to demo/base/weights.safetensors

State lives in the user's cache folder. Two CPU cores need about three hours, a large GPU minutes.
With `--world large` it learns the large world, whose autoencoder `autoencoder_training.py` has to have trained; state
and weights of that one live in the cache folder of `artwork.py`. `--minutes 9` stops after nine minutes, to be resumed.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Freed memory is kept rather than returned to the system: page faults would halve the speed. Must precede libc's start.
MALLOC: dict[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
if __name__ == "__main__" and sys.argv[1:2] in (["run"], ["decoder"]) and not MALLOC.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, "-m", "demo.base.train", *sys.argv[1:]], {**os.environ, **MALLOC})

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from .artwork import LARGE, OBJECTS, SMALL, cache_folder, objects, user_cache  # noqa: E402
from .autoencoder import decode, load_autoencoder  # noqa: E402
from .autoencoder_training import train_autoencoder, train_decoder  # noqa: E402
from .muon import Muon  # noqa: E402
from .pool import Pool, make_pool  # noqa: E402
from .text_encoder import CaptionEncoder  # noqa: E402
from .threads import FreeCores  # noqa: E402
from .unet import new_unet, predict_noise, sample, sigmas  # noqa: E402
from .world import COLOURS, PATTERNS, SIDES, SIZES, Scene, caption  # noqa: E402

log = logging.getLogger("train")

SEED: int = 7
AUTOENCODER_STEPS: int = 1500
DECODER_STEPS: int = 2200


class Stage(NamedTuple):
    """UNet training at one size. Learning words is four times cheaper on 64 px scenes; 128 px is what we want."""

    image_size: int
    scenes: int
    batch: int
    steps: int


STAGES: dict[tuple[str, str], tuple[Stage, ...]] = {
    (SMALL, "cpu"): (Stage(64, 12288, 32, 1000), Stage(128, 6144, 24, 2000)),
    (SMALL, "cuda"): (Stage(64, 12288, 32, 1000), Stage(128, 6144, 24, 2000)),
    (LARGE, "cpu"): (Stage(64, 24576, 32, 8000), Stage(128, 24576, 24, 8000)),
    (LARGE, "cuda"): (Stage(64, 131072, 256, 4000), Stage(128, 196608, 256, 12000)),
}
ADAM_ONLY: tuple[str, ...] = ("input_blocks.0.", "out.", "time_embed.")  # first and last layers; the costliest matrix
ADAM_RATE: float = 4e-4
MUON_RATE: float = 1.5e-3
WARMUP: int = 100
DECAY_SHARE: float = 0.3  # of all steps, at the end, over which the learning rate falls to nothing
EMPTY_SHARE: float = 0.1  # of captions left out, for guidance
SNR_CAP: float = 5.0  # min-SNR weighting (Hang et al., 2023)
EMA_DECAY: float = 0.998
SAVE_SECONDS: float = 300
SAMPLE_STEPS: int = 200


class Training:
    """Everything that a run needs to go on: UNet, its moving average, optimizers, and the step it is at."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.unet = new_unet(SEED).to(device, memory_format=torch.channels_last)
        torch._dynamo.config.suppress_errors = True  # without a C++ compiler it runs uncompiled, a quarter slower
        self.compiled = torch.compile(self.unet, dynamic=False)
        self.average = new_unet(SEED).to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
        named = list(self.unet.named_parameters())
        is_matrix = {name: p.ndim > 1 and not name.startswith(ADAM_ONLY) for name, p in named}
        adam = torch.optim.AdamW(
            [p for name, p in named if not is_matrix[name]],
            lr=ADAM_RATE,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        muon = Muon([p for name, p in named if is_matrix[name]], lr=MUON_RATE)
        self.optimizers: list[torch.optim.Optimizer] = [adam, muon]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.step = 0
        self.encode_captions = CaptionEncoder(device)
        levels = sigmas()
        self.signal = (1 / (levels**2 + 1) ** 0.5).to(device)  # (1000,)
        self.noise = (levels / (levels**2 + 1) ** 0.5).to(device)  # (1000,)
        self.weight = (SNR_CAP * levels**2).clamp(max=1).to(device)  # (1000,) min(SNR, cap) / SNR

    @property
    def checkpoint(self) -> Path:
        return self.folder / "unet.pt"

    def save(self) -> None:
        partial = self.checkpoint.with_suffix(".part")
        state = {"step": self.step, "unet": self.unet.state_dict(), "average": self.average.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        if "optimizers" in state:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.step = state["step"]

    def learn(self, pool: Pool, batch: int, factor: float) -> float:
        """One step; `factor` scales the learning rates. Chance depends on the step alone, so resuming is seamless."""
        rng = np.random.RandomState(SEED * 1_000_003 + self.step)
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + self.step)
        chosen = torch.from_numpy(rng.randint(len(pool.captions), size=batch))
        captions = ["" if rng.rand() < EMPTY_SHARE else pool.captions[i] for i in chosen.tolist()]
        latent = pool.latents[chosen].float()
        target = torch.randn(latent.shape, generator=generator).to(self.device)
        # One timestep from each of `batch` equal slices: same distribution, less variance.
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (1000 / batch)).long().to(self.device)
        per_row = (-1, 1, 1, 1)
        noisy = self.signal[t].view(per_row) * latent.to(self.device) + self.noise[t].view(per_row) * target
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = predict_noise(self.compiled, noisy, t.float(), self.encode_captions(captions))
        loss = (self.weight[t] * (predicted - target).square().mean(dim=(1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        self.unet.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.unet.parameters()), 1 - decay)
        return loss.item()

    def draw(self, captions: list[str], image_size: int, seed: int = 0) -> list[Image.Image]:
        """Pictures by the averaged UNet."""
        empty = self.encode_captions([""])
        latent = sample(self.average, self.encode_captions(captions), empty, image_size // 8, seed)
        return decode(load_autoencoder(self.folder / "autoencoder.pt", self.device), latent, self.device)


def example_captions(count: int, world: str = SMALL) -> list[str]:
    """Captions of scenes that sweep through objects and factors together."""
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


def learning_rate_factor(step: int, total: int) -> float:
    """Warm-up, plateau, then a straight fall to zero."""
    decay = max(1, round(DECAY_SHARE * total))
    return min(1.0, (step + 1) / WARMUP, max(0.0, (total - step) / decay))


def train_unet(
    folder: Path, device: str, stages: tuple[Stage, ...], world: str = SMALL, minutes: float | None = None
) -> None:
    """Until all stages are done, or for so many minutes."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    workers = max(0, (os.cpu_count() or 1) - 2) if device == "cuda" else 0
    training = Training(folder, device)
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
        name = folder / f"pool-{stage.image_size}.pt"
        size, count, seed = stage.image_size, stage.scenes, SEED + stage.image_size
        pool = make_pool(
            name,
            folder / "autoencoder.pt",
            image_size=size,
            count=count,
            seed=seed,
            device=device,
            world=world,
            workers=workers,
        )
        training.encode_captions.forget()
        losses: list[float] = []
        since = time.monotonic()
        while training.step < end:
            cores.adjust()
            losses.append(training.learn(pool, stage.batch, learning_rate_factor(training.step, total)))
            if training.step % 25 == 0:
                rate = len(losses) * stage.batch / (time.monotonic() - since)
                entry = {"step": training.step, "of": total, "size": size, "loss": round(float(np.mean(losses)), 5)}
                entry |= {"images_per_s": round(rate, 2), "threads": torch.get_num_threads()}
                log.info("unet %s", json.dumps(entry))
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


def run(folder: Path, device: str, autoencoder_steps: int, stages: tuple[Stage, ...]) -> None:
    torch.manual_seed(SEED)
    if not (folder / "autoencoder.pt").exists():
        train_autoencoder(folder / "autoencoder.pt", steps=autoencoder_steps, seed=SEED, device=device)
    train_unet(folder, device, stages)


def status(folder: Path) -> None:
    lines = (folder / "train.log").read_text().splitlines()
    log.info("%s", "\n".join(lines[-5:]))


def export(folder: Path, world: str = SMALL) -> None:
    from .weights import write_weights

    average: dict[str, Tensor] = torch.load(folder / "unet.pt", map_location="cpu", weights_only=True)["average"]
    autoencoder: dict[str, Tensor] = torch.load(folder / "autoencoder.pt", map_location="cpu", weights_only=True)
    if world == SMALL:
        path = write_weights(average, autoencoder)
    else:
        path = write_weights(average, autoencoder, folder / f"weights_{world}.safetensors")
    log.info("wrote %s, %.1f MB", path.name, path.stat().st_size / 1e6)


def adopt(folder: Path) -> None:
    """Turn the shipped weights into the state of a run that has made no step and knows no optimizer."""
    from .weights import read_parts

    if (folder / "unet.pt").exists():
        raise SystemExit(f"{folder} holds a run already. Give another folder with --state.")
    unet, autoencoder = read_parts()
    torch.save(autoencoder, folder / "autoencoder.pt")
    torch.save({"step": 0, "unet": unet, "average": unet}, folder / "unet.pt")
    log.info("a run that begins with the shipped weights is in %s", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "decoder", "status", "export", "adopt"))
    parser.add_argument("--world", choices=tuple(OBJECTS), default=SMALL)
    parser.add_argument("--state", type=Path, help="folder for logs and checkpoints")
    parser.add_argument("--steps", type=int, nargs=2, help="UNet steps at 64 and 128 px")
    parser.add_argument("--minutes", type=float, help="stop after so many, to be resumed by the same command")
    parser.add_argument("--autoencoder-steps", type=int, default=AUTOENCODER_STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    arguments = parser.parse_args()
    world = arguments.world
    arguments.state = arguments.state or (user_cache() / "base" if world == SMALL else cache_folder() / "state")
    arguments.state.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if arguments.command in ("run", "decoder"):
        handlers.append(logging.FileHandler(arguments.state / "train.log"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.command == "status":
        status(arguments.state)
    elif arguments.command == "decoder":
        steps = arguments.decoder_steps
        train_decoder(arguments.state / "autoencoder.pt", steps=steps, seed=SEED + 1, device=device)
    elif arguments.command == "export":
        export(arguments.state, world)
    elif arguments.command == "adopt":
        adopt(arguments.state)
    else:
        stages = STAGES[world, device]
        if arguments.steps:
            stages = tuple(s._replace(steps=steps) for s, steps in zip(stages, arguments.steps, strict=True))
        if world == SMALL:
            run(arguments.state, device, arguments.autoencoder_steps, stages)
        else:
            if not (arguments.state / "autoencoder.pt").exists():
                raise SystemExit("Train the autoencoder first: python -m demo.base.autoencoder_training run")
            train_unet(arguments.state, device, stages, world, arguments.minutes)


if __name__ == "__main__":
    main()
