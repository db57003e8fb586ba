"""The training that is interrupted: a tiny SD1.5 with random weights, float32, on the host of this process.

Samples are drawn, validation is measured, and the state is saved every third step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..host import CACHE, full_size

STEPS = 12
EVERY = {"sample_every": 5, "validation_every": 4, "save_every": 3}
SIDE = 64
INPUTS = {"resolution": SIDE, "steps": STEPS, "rank": 2, "alpha": 2.0, "previews": 0}
NAME = "interrupted"
PICTURES = 3


def trainer_on(base: Path) -> Callable[[], str]:
    """Start the host on a base directory. -> see `trainer`"""
    host = full_size().start_host(base, CACHE / "checkpoints")
    host.pack_nodes()
    return trainer(host)


def trainer(host: Any) -> Callable[[], str]:
    """`train()` trains through the node, and resumes if it was stopped. -> a digest of the adapter's bits"""
    from sa_inject.nodes.host.drawing import preview

    preview.STEPS = 2
    model, clip, vae = host.load_checkpoint("sd15")
    (settings,) = host.execute("SAInjectTrainingSettings", **EVERY)
    given = {"model": model, "clip": clip, "vae": vae, "images": pictures(), "settings": settings, **INPUTS}

    def train() -> str:
        adapter, *_ = host.execute("TrainSAInjectAdapter", file_name=NAME, **given)
        return digest({**adapter.lora.state_dict(), **adapter.token_embedding})

    return train


def pictures() -> Any:
    """(n, h, w, 3) in 0..1"""
    import torch

    return torch.rand(PICTURES, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))


def digest(tensors: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()
