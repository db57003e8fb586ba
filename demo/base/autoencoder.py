"""Stage 1 of the base model: an autoencoder in TAESD layout (Ollin Boer Bohan's tiny autoencoder), from scratch.

It stands for the general-purpose autoencoder that a real base model comes with, so it sees all artwork, held-out
objects included: a subject that the UNet never saw must still encode and decode well.
"""

import logging
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .artwork import catalogue
from .host import use_host
from .muon import Muon
from .threads import FreeCores
from .world import box, random_scene, render

use_host("cuda" if torch.cuda.is_available() else "cpu")
from comfy.taesd.taesd import TAESD  # noqa: E402

log = logging.getLogger(__name__)

LATENT_SCALE: float = 0.18215  # what SD1.5's latent format multiplies by; the host's own TAESD loader undoes it so too
CROP: int = 64
BATCH: int = 8
LEARNING_RATE: float = 1e-3
LATENT_NOISE: float = 0.07  # keeps latents smooth, so that the UNet's small errors stay small in pixels
MOMENT_WEIGHT: float = 0.02  # of the pull of every channel towards mean 0 and standard deviation 1


def new_autoencoder(seed: int) -> TAESD:
    """The host's class with weights we draw: its layers come uninitialised."""
    model = TAESD(latent_channels=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("vae_"):
                continue
            if weight.ndim == 1:
                weight.zero_()
                continue
            gain = 0.5 if name.endswith("conv.4.weight") else 2**0.5
            weight.normal_(0, gain / weight[0].numel() ** 0.5, generator=generator)
        model.vae_scale.fill_(LATENT_SCALE)
    model.vae_scale.requires_grad_(False)
    model.vae_shift.requires_grad_(False)
    return model


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB pictures of one size. -> (b, 3, h, w) in 0..1"""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def _crop(rng: np.random.RandomState) -> Image.Image:
    """A crop that usually shows part of an object, at a scale and before a colour that scenes may not have."""
    scene = random_scene(rng, catalogue())
    image_size = (64, 128, 128, 128, 160)[rng.randint(5)]
    picture = render(scene, image_size)
    left, top, right, bottom = box(scene, image_size)
    x = int(np.clip(rng.randint(left - CROP // 2, right - CROP // 2 + 1), 0, image_size - CROP))
    y = int(np.clip(rng.randint(top - CROP // 2, bottom - CROP // 2 + 1), 0, image_size - CROP))
    picture = picture.crop((x, y, x + CROP, y + CROP))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else picture


def train_autoencoder(path: Path, *, steps: int, seed: int, device: str) -> None:
    """Train and write the TAESD state dict to `path`. An interrupted run, kept beside it, goes on where it was."""
    _train(new_autoencoder(seed).to(device), path, path.with_suffix(".part"), steps=steps, seed=seed, device=device)


def train_decoder(path: Path, *, steps: int, seed: int, device: str) -> None:
    """Go on with the decoder alone. Latents stay what they are, so a UNet that was trained on them stays right."""
    model = load_autoencoder(path, device)
    model.taesd_decoder.requires_grad_(True)
    _train(model, path, path.with_suffix(".decoder-part"), steps=steps, seed=seed, device=device)


def _train(model: TAESD, path: Path, partial: Path, *, steps: int, seed: int, device: str) -> None:
    """Train whatever of the model requires gradients; `partial` is kept until `path` is written."""
    done = 0
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        model.load_state_dict(state["weights"])
        done = state["step"]
    rng = np.random.RandomState(seed + done)
    torch.manual_seed(seed + done)
    model.to(memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [
        Muon([p for p in parameters if p.ndim > 1], lr=LEARNING_RATE),
        torch.optim.AdamW([p for p in parameters if p.ndim == 1], lr=LEARNING_RATE, betas=(0.9, 0.99)),
    ]
    started = time.monotonic()
    cores = FreeCores()
    for step in range(done + 1, steps + 1):
        cores.adjust()
        pixels = to_tensor([_crop(rng) for _ in range(BATCH)]).to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            latent = model.taesd_encoder(pixels).float()  # (b, 4, h/8, w/8)
            decoded = model.taesd_decoder(latent + LATENT_NOISE * torch.randn_like(latent)).float()
        error = decoded - pixels
        std, mean = torch.std_mean(latent, dim=(0, 2, 3))
        moments = (std - 1).square().mean() + mean.square().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + MOMENT_WEIGHT * moments
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / 20, (steps - step + 1) / (0.6 * steps))
            optimizer.step()
        if step % 50 == 0 or step == steps:
            psnr = -10 * error.detach().square().mean().log10().item()
            figures = (loss.item(), psnr, std.mean().item(), (step - done) * BATCH / (time.monotonic() - started))
            log.info("autoencoder %d/%d loss %.4f psnr %.1f std %.2f images/s %.1f", step, steps, *figures)
            torch.save({"step": step, "weights": _weights(model)}, partial)
    torch.save(_weights(model), partial)
    partial.replace(path)


def _weights(model: TAESD) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}


def load_autoencoder(path: Path, device: str = "cpu") -> TAESD:
    model = TAESD(latent_channels=4)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def encode(model: TAESD, images: list[Image.Image], device: str = "cpu") -> Tensor:
    """Pictures to what the UNet sees: latents after SD1.5's own scaling. -> (b, 4, h/8, w/8)"""
    pixels = to_tensor(images).to(device, memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        return model.taesd_encoder(pixels).float().cpu()


@torch.no_grad()
def decode(model: TAESD, latent: Tensor, device: str = "cpu") -> list[Image.Image]:
    """(b, 4, h, w), scaled as the UNet sees it, to pictures."""
    latent = latent.to(device, memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        pixels = model.taesd_decoder(latent).float().clamp(0, 1)
    pixels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]
