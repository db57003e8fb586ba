"""Trains the demo's base model: autoencoder, then UNet on 64 px scenes, then on 128 px scenes.

    python -m demo.base.train run        start, or resume from the last checkpoint
    python -m demo.base.train decoder    then train the autoencoder's decoder alone, which does not change latents
    python -m demo.base.train status     how far it is
    python -m demo.base.train export     write the current weights to demo/base/weights.safetensors

The state is in the user's cache folder. Two CPU cores need three to five hours, a large GPU minutes. `--world large`
selects the large set of objects. Its autoencoder must have been trained by `autoencoder_training.py`. State and weights
are then in the cache folder of `artwork.py`. `--minutes 9` stops after nine minutes, to be resumed.
"""

import argparse
import logging
from pathlib import Path

from .memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory("demo.base.train", ("run", "decoder"))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from .artwork import LARGE, OBJECTS, SMALL, cache_folder, user_cache  # noqa: E402
from .autoencoder import decode, load_autoencoder  # noqa: E402
from .autoencoder_training import train_autoencoder, train_decoder  # noqa: E402
from .learning import SEED, Batch, NetworkTraining, Rates, Stage, log_to, status, train  # noqa: E402
from .text_encoder import CaptionEncoder  # noqa: E402
from .unet import new_unet, predict_noise, sample, sigmas  # noqa: E402

log = logging.getLogger("train")

AUTOENCODER_STEPS: int = 1500
DECODER_STEPS: int = 2200

# Words are learned at a quarter of the cost on 64 px scenes. The final size is 128 px.
STAGES: dict[tuple[str, str], tuple[Stage, ...]] = {
    (SMALL, "cpu"): (Stage(64, 12288, 32, 1000), Stage(128, 6144, 24, 2000)),
    (SMALL, "cuda"): (Stage(64, 12288, 32, 1000), Stage(128, 6144, 24, 2000)),
    (LARGE, "cpu"): (Stage(64, 24576, 32, 6000), Stage(128, 12288, 24, 4000)),
    (LARGE, "cuda"): (Stage(64, 131072, 256, 4000), Stage(128, 196608, 256, 12000)),
}
RATES: Rates = Rates(adam=4e-4, muon=1.5e-3, adam_only=r"input_blocks\.0\.|out\.|time_embed\.")
SNR_CAP: float = 5.0  # min-SNR weighting (Hang et al., 2023)


class Training(NetworkTraining):
    """Training of the UNet."""

    kind = "unet"

    def __init__(self, folder: Path, device: str):
        unet, average = (new_unet(SEED).to(device, memory_format=torch.channels_last) for _ in range(2))
        super().__init__(folder, device, unet, average, RATES)
        self.unet = unet
        torch._dynamo.config.suppress_errors = True  # without a C++ compiler it runs uncompiled, a quarter slower
        self.compiled = torch.compile(unet, dynamic=False)
        self.encode_captions = CaptionEncoder(device)
        levels = sigmas()
        self.signal = (1 / (levels**2 + 1) ** 0.5).to(device)  # (1000,)
        self.noise = (levels / (levels**2 + 1) ** 0.5).to(device)  # (1000,)
        self.weight = (SNR_CAP * levels**2).clamp(max=1).to(device)  # (1000,) min(SNR, cap) / SNR

    def loss(self, batch: Batch) -> Tensor:
        t = (batch.fraction * 1000).long().clamp(max=999)
        per_row = (-1, 1, 1, 1)
        noisy = self.signal[t].view(per_row) * batch.latent + self.noise[t].view(per_row) * batch.noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = predict_noise(self.compiled, noisy, t.float(), self.encode_captions(batch.captions))
        return (self.weight[t] * (predicted - batch.noise).square().mean(dim=(1, 2, 3))).mean()

    def forget_captions(self) -> None:
        self.encode_captions.forget()

    def draw(self, captions: list[str], image_size: int, seed: int = 0) -> list[Image.Image]:
        empty = self.encode_captions([""])
        latent = sample(self.average, self.encode_captions(captions), empty, image_size // 8, seed)
        return decode(load_autoencoder(self.folder / "autoencoder.pt", self.device), latent, self.device)


def run(
    folder: Path,
    device: str,
    autoencoder_steps: int,
    stages: tuple[Stage, ...],
    world: str = SMALL,
    minutes: float | None = None,
) -> None:
    torch.manual_seed(SEED)
    if not (folder / "autoencoder.pt").exists():
        if world == LARGE:
            raise SystemExit("Train the autoencoder first: python -m demo.base.autoencoder_training run")
        train_autoencoder(folder / "autoencoder.pt", steps=autoencoder_steps, seed=SEED, device=device)
    train(Training(folder, device), stages, world, minutes)


def export(folder: Path, world: str = SMALL) -> None:
    from .weights import write_weights

    average: dict[str, Tensor] = torch.load(folder / "unet.pt", map_location="cpu", weights_only=True)["average"]
    autoencoder: dict[str, Tensor] = torch.load(folder / "autoencoder.pt", map_location="cpu", weights_only=True)
    if world == SMALL:
        path = write_weights(average, autoencoder)
    else:
        path = write_weights(average, autoencoder, folder / f"weights_{world}.safetensors")
    log.info("wrote %s, %.1f MB", path.name, path.stat().st_size / 1e6)


def start_from_shipped_weights(folder: Path) -> None:
    """Make the shipped weights the state of a run at step 0, with new optimizers.

    An autoencoder that is there already stays: latents of one that was trained further are still similar.
    """
    from .weights import read_parts

    if (folder / "unet.pt").exists():
        raise SystemExit(f"{folder} holds a run already. Give another folder with --state.")
    unet, autoencoder = read_parts()
    if not (folder / "autoencoder.pt").exists():
        torch.save(autoencoder, folder / "autoencoder.pt")
    torch.save({"step": 0, "unet": unet, "average": unet}, folder / "unet.pt")
    log.info("a run that begins with the shipped weights is in %s", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "decoder", "status", "export", "adopt"))
    parser.add_argument("--world", choices=tuple(OBJECTS), default=SMALL)
    parser.add_argument("--state", type=Path, help="folder for logs and checkpoints")
    parser.add_argument("--steps", type=int, nargs=2, help="UNet steps at 64 and 128 px")
    parser.add_argument("--scenes", type=int, nargs=2, help="scenes to learn from at 64 and 128 px")
    parser.add_argument("--minutes", type=float, help="stop after so many, to be resumed by the same command")
    parser.add_argument("--autoencoder-steps", type=int, default=AUTOENCODER_STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    arguments = parser.parse_args()
    world = arguments.world
    arguments.state = arguments.state or (user_cache() / "base" if world == SMALL else cache_folder() / "state")
    arguments.state.mkdir(parents=True, exist_ok=True)
    log_to(arguments.state if arguments.command in ("run", "decoder") else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.command == "status":
        status(arguments.state)
    elif arguments.command == "decoder":
        steps = arguments.decoder_steps
        train_decoder(arguments.state / "autoencoder.pt", steps=steps, seed=SEED + 1, device=device)
    elif arguments.command == "export":
        export(arguments.state, world)
    elif arguments.command == "adopt":
        start_from_shipped_weights(arguments.state)
    else:
        stages = STAGES[world, device]
        for field, values in (("steps", arguments.steps), ("scenes", arguments.scenes)):
            if values:
                stages = tuple(s._replace(**{field: value}) for s, value in zip(stages, values, strict=True))
        run(arguments.state, device, arguments.autoencoder_steps, stages, world, arguments.minutes)


if __name__ == "__main__":
    main()
