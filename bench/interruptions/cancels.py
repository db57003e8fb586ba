"""Trainings through /prompt on a real server, cancelled at random moments through /interrupt."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from ..host import CACHE, ROOT, comfyui
from .training import EVERY, INPUTS, digest, pictures

NODE = "train"
LONGEST = 1200.0  # seconds of one training on a busy machine


def cancelled(base: Path, times: int, chance: random.Random) -> dict[str, Any]:
    """A row of the table. Every training is compared with one of the same server that nobody stopped."""
    from tests.host.client import PromptInterrupted
    from tests.host.server_process import ServerProcess

    graph = _graph(base)
    with ServerProcess(comfyui(), base, {"sa-inject": ROOT}) as server:
        client, trainings = server.client, 0

        def train(name: str, cancel_after: float | None = None) -> bool:
            """-> whether it came to its end"""
            graph[NODE]["inputs"]["file_name"] = name
            prompt = client.queue(graph)
            if cancel_after is not None:
                time.sleep(cancel_after)
                client.interrupt()
            try:
                client.wait(prompt, LONGEST)
            except PromptInterrupted:
                return False
            return True

        def forget() -> None:
            shutil.rmtree(base / "models/sa_inject/training_states", ignore_errors=True)

        train("warm")
        forget()
        begun = time.monotonic()
        train("undisturbed")
        seconds, expected = time.monotonic() - begun, _digest_of(base, "undisturbed")
        happened = finished = equal = 0
        while happened < times or finished == 0:
            trainings += 1
            forget()
            name, in_this_one = f"cancelled-{trainings}", 0
            while True:
                wanted = happened < times and in_this_one < 3
                if train(name, chance.uniform(0.1, 0.6) * seconds if wanted else None):
                    break
                happened, in_this_one = happened + 1, in_this_one + 1
            finished += 1
            equal += _digest_of(base, name) == expected
    return {"interruption": "POST /interrupt", "times": happened, "trainings finished": finished, "bit-equal": equal}


def _digest_of(base: Path, name: str) -> str:
    from safetensors.torch import load_file

    return digest(load_file(base / "models" / "sa_inject" / f"{name}.safetensors"))


def _graph(base: Path) -> dict[str, Any]:
    """The training as a graph, and its files on the base directory."""
    from PIL import Image

    from tests.host.tiny_checkpoints import tiny_checkpoint

    checkpoints, inputs = base / "models" / "checkpoints", base / "input"
    for folder in (checkpoints, inputs):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = Path(shutil.copy(tiny_checkpoint("sd15", CACHE / "checkpoints"), checkpoints))
    for number, picture in enumerate(pictures()):
        Image.fromarray((picture * 255).round().byte().numpy()).save(inputs / f"{number}.png")

    def node(kind: str, **given: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": given}

    return {
        "base": node("CheckpointLoaderSimple", ckpt_name=checkpoint.name),
        "first": node("LoadImage", image="0.png"),
        "second": node("LoadImage", image="1.png"),
        "pictures": node("ImageBatch", image1=["first", 0], image2=["second", 0]),
        "settings": node(
            "SAInjectTrainingSettings", sample_prompts="", kept=4, hold_out=False, **{**EVERY, "sample_every": 8}
        ),
        NODE: node(
            "TrainSAInjectAdapter",
            model=["base", 0],
            clip=["base", 1],
            vae=["base", 2],
            images=["pictures", 0],
            settings=["settings", 0],
            placeholder_token="sainj",
            class_word="toy",
            lora_learning_rate=1e-3,
            token_learning_rate=6e-3,
            token_vectors=4,
            batch_size=1,
            gradient_accumulation=1,
            reference_mode="clean",
            precision="fp32",
            gradient_checkpointing=False,
            seed=0,
            **INPUTS,
        ),
    }
