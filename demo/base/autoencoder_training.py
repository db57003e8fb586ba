"""Stage 1 of the base model: the training of its autoencoder.

A real base model has a general-purpose autoencoder. So this one sees all artwork, held-out objects included: subjects
that the UNet never saw must be encoded and decoded well. The loss compares pixels, their gradients, and the features of
a network trained on ImageNet. Later, a discriminator is added.

    python -m demo.base.autoencoder_training run       start, or resume from the last checkpoint
    python -m demo.base.autoencoder_training freeze    end it here: a UNet can be trained on these latents
    python -m demo.base.autoencoder_training decoder   then train the decoder alone, which does not change latents
    python -m demo.base.autoencoder_training score     likeness of decoded scenes of held-out subjects, by both judges
"""

import argparse
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .artwork import LARGE, OBJECTS, SMALL, cache_folder
from .autoencoder import TAESD, load_autoencoder, new_autoencoder, weights_of
from .autoencoder_losses import Discriminator, gradient_difference
from .autoencoder_score import score, sheet
from .crops import Crops
from .muon import Muon
from .precision import fast
from .threads import FreeCores

log = logging.getLogger("autoencoder")

CROP: int = 64
BATCH: int = 8
LEARNING_RATE: float = 1e-3
WARMUP: int = 20
DECAY_SHARE: float = 0.3  # of all steps, at the end
EMA_DECAY: float = 0.999
LATENT_NOISE: float = 0.06  # the maximum; keeps latents smooth, so that the UNet's small errors stay small in pixels
MOMENT_WEIGHT: float = 0.02  # weight of the loss that gives every channel mean 0 and standard deviation 1
SQUARE_WEIGHT: float = 2.0
GRADIENT_WEIGHT: float = 1.0
PERCEPTION_WEIGHT: float = 0.3
ADVERSARIAL_WEIGHT: float = 0.1  # its gradient at the last layer, relative to that of all other terms
ADVERSARIAL_FROM: float = 0.5  # of all steps
SAVE_SECONDS: float = 180
SHEET_STEPS: int = 500
SEED: int = 7


class Plan(NamedTuple):
    """The arguments of a run."""

    steps: int
    seed: int = SEED
    device: str = "cpu"
    world: str = SMALL
    batch: int | None = None  # BATCH
    learning_rate: float | None = None  # LEARNING_RATE
    perception: bool = False
    adversarial: bool = False
    workers: int = 0  # processes that compose crops
    minutes: float | None = None  # stop after this, to be resumed


class Training:
    """The whole state of a run, stored in `partial`."""

    def __init__(self, model: TAESD, partial: Path, plan: Plan):
        self.model, self.partial, self.plan = model, partial, plan
        model.to(plan.device, memory_format=torch.channels_last)
        self.learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.learning]
        rate = plan.learning_rate or LEARNING_RATE
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon([p for p in self.parameters if p.ndim > 1], lr=rate),
            torch.optim.AdamW([p for p in self.parameters if p.ndim == 1], lr=rate, betas=(0.9, 0.99)),
        ]
        self.rate = rate
        self.perceive: nn.Module | None = None
        if plan.perception:
            from .imagenet import Perception

            self.perceive = Perception().to(plan.device)
        self.discriminator = Discriminator().to(plan.device) if plan.adversarial else None
        if self.discriminator is not None:
            self.optimizers.append(torch.optim.AdamW(self.discriminator.parameters(), lr=rate / 4, betas=(0.5, 0.99)))
        self.step = 0
        self._load()

    def _load(self) -> None:
        state = (
            torch.load(self.partial, map_location=self.plan.device, weights_only=True) if self.partial.exists() else {}
        )
        if state:
            self.model.load_state_dict(state["weights"])
            self.step = state["step"]
        kept = state.get("average", {})
        self.average = {name: kept.get(name, p.detach()).clone() for name, p in self.learning}
        for optimizer, saved in zip(self.optimizers, state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(saved)
        if self.discriminator is not None and "discriminator" in state:
            self.discriminator.load_state_dict(state["discriminator"])

    def averaged(self) -> dict[str, Tensor]:
        """The model's weights. Those that are trained are averaged over the last steps."""
        found = weights_of(self.model)
        return found | {name: value.cpu().contiguous() for name, value in self.average.items()}

    def save(self) -> None:
        state = {"step": self.step, "weights": weights_of(self.model), "average": self.average}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
        unfinished = self.partial.with_name(self.partial.name + ".new")
        torch.save(state, unfinished)
        os.replace(unfinished, self.partial)

    def learn(self, pixels: Tensor, factor: float) -> dict[str, float]:
        """One step on (b, 3, h, w) in 0..1; `factor` scales the learning rates."""
        noise = torch.Generator(pixels.device).manual_seed(self.plan.seed * 1_000_003 + self.step)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with fast(self.plan.device):
            latent = self.model.taesd_encoder(pixels).float()  # (b, 4, h/8, w/8)
            amount = LATENT_NOISE * torch.rand(len(latent), 1, 1, 1, generator=noise, device=latent.device)
            noisy = latent + amount * torch.randn(latent.shape, generator=noise, device=latent.device)
            decoded = self.model.taesd_decoder(noisy).float()
        error = decoded - pixels
        std, mean = torch.std_mean(latent, dim=(0, 2, 3))
        moments = (std - 1).square().mean() + mean.square().mean()
        square = error.square().mean()
        loss = error.abs().mean() + SQUARE_WEIGHT * square + GRADIENT_WEIGHT * gradient_difference(decoded, pixels)
        figures = {"psnr": -10 * square.detach().log10().item(), "std": std.mean().item()}
        if self.perceive is not None:
            with fast(self.plan.device):
                perceived = self.perceive(decoded.clamp(0, 1), pixels)
            loss = loss + PERCEPTION_WEIGHT * perceived
            figures["perception"] = perceived.item()
        if self.discriminator is not None and self.step >= ADVERSARIAL_FROM * self.plan.steps:
            self.discriminate(pixels, decoded.detach())
            loss = loss + self.adversarial(loss, decoded)
        loss = loss + MOMENT_WEIGHT * moments
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers[:2]:
            optimizer.param_groups[0]["lr"] = self.rate * factor
            optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), self.parameters, 1 - decay)
        return {"loss": loss.item(), **figures}

    def discriminate(self, pixels: Tensor, decoded: Tensor) -> None:
        """The discriminator's own step (hinge loss)."""
        assert self.discriminator is not None
        real, fake = self.discriminator(torch.cat([pixels, decoded])).chunk(2)
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        self.discriminator.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[2].step()

    def adversarial(self, loss: Tensor, decoded: Tensor) -> Tensor:
        """The discriminator's loss, scaled by its gradient at the last layer (Esser et al., 2021, eq. 7)."""
        assert self.discriminator is not None
        fooled = -self.discriminator(decoded).mean()
        last = self.model.taesd_decoder[-1].weight
        ours, theirs = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (loss, fooled))
        return ADVERSARIAL_WEIGHT * (ours / (theirs + 1e-6)).clamp(max=1e3).detach() * fooled


def learning_rate_factor(step: int, steps: int) -> float:
    decay = max(1, round(DECAY_SHARE * steps))
    return min(1.0, step / WARMUP, (steps - step + 1) / decay)


def train(model: TAESD, path: Path, partial: Path, plan: Plan) -> None:
    """Train the model's parameters with gradients. `partial` is kept until `path` is written."""
    training = Training(model, partial, plan)
    batch = plan.batch or BATCH
    crops = DataLoader(
        Crops(plan.world, plan.seed, batch, CROP),
        batch_size=None,
        sampler=range(training.step + 1, plan.steps + 1),
        num_workers=plan.workers,
    )
    cores = FreeCores()
    began, first, saved = time.monotonic(), training.step, time.monotonic()
    for pixels in crops:
        cores.adjust()
        factor = learning_rate_factor(training.step + 1, plan.steps)
        figures = training.learn(pixels.to(plan.device).float() / 255, factor)
        if training.step % 50 == 0 or training.step == plan.steps:
            speed = (training.step - first) * batch / (time.monotonic() - began)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            log.info("%d of %d: %s, %.1f pictures a second", training.step, plan.steps, shown, speed)
        is_over = plan.minutes is not None and time.monotonic() - began > 60 * plan.minutes
        if time.monotonic() - saved > SAVE_SECONDS or is_over:
            training.save()
            saved = time.monotonic()
        if is_over:
            log.info("stopped at step %d of %d; the same command goes on", training.step, plan.steps)
            return
        if training.step % SHEET_STEPS == 0:
            path_of_sheet = partial.with_name(f"autoencoder-{training.step:06d}.png")
            sheet(training.averaged(), path_of_sheet, plan.world, plan.device)
    torch.save(training.averaged(), partial)
    partial.replace(path)


def train_autoencoder(path: Path, *, steps: int, seed: int, device: str) -> None:
    """Train and write the TAESD state dict to `path`. An interrupted run is resumed."""
    train(new_autoencoder(seed), path, path.with_suffix(".part"), Plan(steps, seed, device))


def train_decoder(path: Path, *, steps: int, seed: int, device: str) -> None:
    """Train the decoder alone. Latents do not change, so a UNet that was trained on them still fits."""
    model = load_autoencoder(path, device)
    model.taesd_decoder.requires_grad_(True)
    train(model, path, path.with_suffix(".decoder-part"), Plan(steps, seed, device))


def read_weights_of(state: Path) -> dict[str, Tensor]:
    """The weights of a finished or current run, or the shipped ones if there is none."""
    for name in ("autoencoder.decoder-part", "autoencoder.part"):
        if (state / name).exists():
            kept = torch.load(state / name, map_location="cpu", weights_only=True)
            return kept["weights"] | kept["average"]
    if (state / "autoencoder.pt").exists():
        return torch.load(state / "autoencoder.pt", map_location="cpu", weights_only=True)
    from .weights import read_parts

    return read_parts()[1]


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "freeze", "decoder", "score"))
    parser.add_argument("--state", type=Path, default=cache_folder() / "state", help="folder for logs and checkpoints")
    parser.add_argument("--world", choices=tuple(OBJECTS), default=LARGE)
    parser.add_argument("--steps", type=int, default=40_000 if on_cuda else 60_000)
    parser.add_argument("--batch", type=int, default=64 if on_cuda else 8)
    parser.add_argument("--rate", type=float, default=1e-3 if on_cuda else 6e-4)
    parser.add_argument("--from-scratch", action="store_true", help="not from the shipped weights")
    parser.add_argument("--minutes", type=float, help="stop after so many, to be resumed by the same command")
    parser.add_argument("--no-perception", action="store_true")
    parser.add_argument("--no-adversarial", action="store_true")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2) if on_cuda else 0)
    options = parser.parse_args()
    options.state.mkdir(parents=True, exist_ok=True)
    log_file = options.state / "autoencoder.log"
    handlers = [logging.StreamHandler(), logging.FileHandler(log_file)]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True)
    device = "cuda" if on_cuda else "cpu"
    weights = read_weights_of(options.state)
    if options.command == "score":
        log.info("%s", score(weights, device))
        return
    path = options.state / "autoencoder.pt"
    if options.command == "freeze":
        torch.save(weights, path)
        path.with_suffix(".part").unlink(missing_ok=True)
        return
    partial = path.with_suffix(".part" if options.command == "run" else ".decoder-part")
    model = new_autoencoder(SEED)
    if not options.from_scratch:
        model.load_state_dict(weights)
    if options.command == "decoder":
        model.taesd_encoder.requires_grad_(False)
    plan = Plan(
        options.steps,
        SEED,
        device,
        options.world,
        options.batch,
        options.rate,
        not options.no_perception,
        not options.no_adversarial,
        options.workers,
        options.minutes,
    )
    train(model, path, partial, plan)


if __name__ == "__main__":
    main()
