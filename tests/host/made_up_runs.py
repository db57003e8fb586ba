"""Trainings that a test makes up: what the server tells of them, and the node in the browser that shows them."""

import math
import time
import uuid
from typing import Any

from tests.host.browser import add_nodes, set_widget

PANEL = ".sa-inject-panel"
PROMPTS = ["a photo of sainj toy on the beach", "a painting of sainj toy"]
LARGE_IS_THERE = "panel => document.querySelector(panel + ' .large img')?.naturalWidth === 512"


def add_training_node(opened: Any) -> int:
    """The training node, whose run gets a name of its own: `opened.run`."""
    (number,) = add_nodes(opened.page, "TrainSAInjectAdapter")
    opened.run = f"told-{uuid.uuid4().hex[:8]}"
    set_widget(opened.page, number, "file_name", opened.run)
    opened.page.wait_for_selector(PANEL)
    return number


def loss_at(step: int) -> float:
    return 0.1 * math.exp(-step / 50) + 0.05


def run_of(name: str, step: int = 60, phase: str = "training", **changes) -> dict:
    return {
        "run": name,
        "updated_at": time.time(),
        "phase": phase,
        "text": f"saved {name}.safetensors",
        "step": step,
        "steps": 100,
        "resumed_at": [],
        "seconds": 30.0,
        "left": 20.0,
        "memory": 5_100_000_000,
        "placeholder_token": "sainj",
        "class_word": "toy",
        "points": [[at, loss_at(at), loss_at(at), loss_at(at) if at % 20 == 0 else None] for at in range(1, step + 1)],
        "samples": [{"step": at, "prompts": PROMPTS, "images": [0, 1]} for at in range(0, step + 1, 20)],
        "kept": [],
        "warnings": [],
        **changes,
    }


def event_of(name: str, node: int, step: int, **changes) -> dict:
    return {
        "node": str(node),
        "run": name,
        "prompt_id": "told",
        "updated_at": time.time(),
        "phase": "training",
        "text": "Training",
        "step": step,
        "steps": 100,
        "resumed_at": None,
        "loss": loss_at(step),
        "smoothed": loss_at(step),
        "validation": None,
        "learning_rate": 1e-3,
        "token_learning_rate": 6e-3,
        "gradient_norm": 0.5,
        "seconds": step / 2,
        "left": (100 - step) / 2,
        "memory": 5_100_000_000,
        "sample": None,
        "warnings": 0,
        **changes,
    }


def put(opened, **told) -> None:
    """What the server answers when it is asked for the run."""
    opened.client.request("/probe/run", run_of(opened.run, **told))


def tell(opened, node: int, step: int, **changes) -> None:
    data = event_of(opened.run, node, step, **changes)
    opened.client.request("/probe/send", {"type": "sa_inject.training", "data": data})


def wait_for(page, text: str) -> None:
    page.wait_for_function(
        "([panel, text]) => document.querySelector(panel)?.innerText.includes(text)", arg=[PANEL, text]
    )
