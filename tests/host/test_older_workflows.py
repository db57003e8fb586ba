"""Workflows that were saved before the training node had its later inputs: they load, and give the same adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host.workflow_to_prompt import workflow_to_prompt

FILES = sorted((Path(__file__).parent / "data" / "older_workflows").glob("*.json"))
TRAINING_FILES = [path for path in FILES if "TrainSAInjectAdapter" in path.read_text(encoding="utf-8")]
# What the files held, by the names that the values had.
SAVED = {
    "placeholder_token": "sainj",
    "class_word": "toy",
    "resolution": 512,
    "steps": 400,
    "lora_learning_rate": 1e-3,
    "token_learning_rate": 6e-3,
    "token_vectors": 4,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "rank": 16,
    "alpha": 16.0,
    "reference_mode": "clean",
    "precision": "auto",
    "gradient_checkpointing": False,
    "seed": 0,
    "file_name": "sainj",
    "previews": 1,
}
SMALL: dict[str, Any] = {"resolution": 64, "steps": 4, "rank": 2, "previews": 0}


def graph_of(path: Path, client) -> dict[str, dict[str, Any]]:
    return workflow_to_prompt(json.loads(path.read_text(encoding="utf-8")), client.object_info())


def training_inputs(path: Path, client) -> dict[str, Any]:
    (inputs,) = (node["inputs"] for node in graph_of(path, client).values() if "Train" in node["class_type"])
    return inputs


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_older_workflow_loads(client, path):
    assert graph_of(path, client)


@pytest.mark.parametrize("path", TRAINING_FILES, ids=lambda path: path.stem)
def test_an_older_workflow_means_what_it_meant(client, path):
    inputs = training_inputs(path, client)
    assert {name: value for name, value in inputs.items() if not isinstance(value, list)} == SAVED
    links = {"model": 0, "clip": 1, "vae": 2, "images": 0, "captions": 1, "masks": 2}
    assert {name: value[1] for name, value in inputs.items() if isinstance(value, list)} == links


@pytest.mark.parametrize("path", TRAINING_FILES, ids=lambda path: path.stem)
def test_an_older_workflow_gives_the_same_adapter(comfy_host, pack_nodes, load_checkpoint, client, path, monkeypatch):
    """The later inputs have their defaults then, as the frontend fills them in."""
    monkeypatch.setattr("sa_inject.nodes.host.drawing.preview.STEPS", 2)
    model, clip, vae = load_checkpoint("sd15")
    pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"model": model, "clip": clip, "vae": vae, "images": pictures}
    saved = {name: value for name, value in training_inputs(path, client).items() if not isinstance(value, list)}
    train: Any = pack_nodes["TrainSAInjectAdapter"]
    off = {"sample_every": 0, "preset": "as set"}
    adapters = []
    for inputs in ({**SAVED, **off}, saved):
        shutil.rmtree(comfy_host.base / "models/sa_inject/training_states", ignore_errors=True)
        adapters.append(comfy_host.execute(train, **given, **{**inputs, **SMALL})[0])
    named, opened = (tensors_of(adapter) for adapter in adapters)
    assert named.keys() == opened.keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in named.items())


def tensors_of(adapter: Any) -> dict[str, torch.Tensor]:
    return {**adapter.lora.state_dict(), **adapter.token_embedding, "text": adapter.class_conditioning.cross_attn}
