"""Trains the tiny NextDiT on the demo's scenes. The bench measures adapters for Z-Image's architecture on it.

    python -m demo.base.train_nextdit run --state FOLDER       start, or resume from the last checkpoint
    python -m demo.base.train_nextdit status --state FOLDER    how far it is
    python -m demo.base.score --state FOLDER                   share of captions that are drawn correctly

The latents are those of the shipped autoencoder. The network is not shipped, so name a folder for it. Without one, it
is in the user's cache folder. `--minutes 9` stops after nine minutes, to be resumed. One core needs two hours.
"""

import argparse
import logging
from pathlib import Path

from .memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory("demo.base.train_nextdit", ("run",))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from .artwork import user_cache  # noqa: E402
from .autoencoder import decode, load_autoencoder  # noqa: E402
from .language_model import CaptionEncoder  # noqa: E402
from .learning import SEED, Batch, NetworkTraining, Rates, Stage, log_to, status, train  # noqa: E402
from .nextdit import blocks, new_nextdit, predict_velocity, sample, shifted  # noqa: E402
from .weights import read_parts  # noqa: E402

log = logging.getLogger("train")

# Encoding a scene takes as long as a training step per picture, so the first steps use few scenes.
STAGES: dict[str, tuple[Stage, ...]] = {
    "cpu": (Stage(128, 2048, 48, 500), Stage(128, 6144, 48, 1100)),
    "cuda": (Stage(128, 65536, 256, 8000),),
}
RATES: Rates = Rates(
    adam=1e-3,
    muon=2e-3,
    adam_only=r"x_embedder|cap_embedder|t_embedder|final_layer|.*adaLN_modulation|.*pad_token",
)


class NextDiTTraining(NetworkTraining):
    kind = "nextdit"

    def __init__(self, folder: Path, device: str):
        network, average = (new_nextdit(SEED).to(device) for _ in range(2))
        super().__init__(folder, device, network, average, RATES)
        torch._dynamo.config.suppress_errors = True  # without a C++ compiler it runs uncompiled
        for block in blocks(network):
            block.compile(dynamic=False)
        self.encode_captions = CaptionEncoder(device)

    def loss(self, batch: Batch) -> Tensor:
        sigma = shifted(batch.fraction)
        share = sigma.view(-1, 1, 1, 1)
        noisy = (1 - share) * batch.latent + share * batch.noise
        predicted = predict_velocity(self.network, noisy, sigma, self.encode_captions(batch.captions))
        return (predicted - (batch.noise - batch.latent)).square().mean()

    def forget_captions(self) -> None:
        self.encode_captions.forget()

    def draw(self, captions: list[str], image_size: int, seed: int = 0) -> list[Image.Image]:
        texts, empty = self.encode_captions(captions), self.encode_captions([""])
        latent = sample(self.average, texts, empty, image_size // 8, seed)
        return decode(load_autoencoder(self.folder / "autoencoder.pt", self.device), latent, self.device)


def run(folder: Path, device: str, stages: tuple[Stage, ...], minutes: float | None = None) -> None:
    torch.manual_seed(SEED)
    if not (folder / "autoencoder.pt").exists():
        torch.save(read_parts()[1], folder / "autoencoder.pt")
    train(NextDiTTraining(folder, device), stages, minutes=minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "status"))
    parser.add_argument("--state", type=Path, help="folder for logs and checkpoints", default=user_cache() / "nextdit")
    parser.add_argument("--steps", type=int, help="of all; also for a run that is resumed")
    parser.add_argument("--minutes", type=float, help="stop after so many, to be resumed by the same command")
    arguments = parser.parse_args()
    arguments.state.mkdir(parents=True, exist_ok=True)
    log_to(arguments.state if arguments.command == "run" else None)
    if arguments.command == "status":
        status(arguments.state)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = STAGES[device]
    if arguments.steps:
        *first, last = stages
        stages = (*first, last._replace(steps=max(0, arguments.steps - sum(stage.steps for stage in first))))
    run(arguments.state, device, stages, arguments.minutes)


if __name__ == "__main__":
    main()
