"""Whole graphs through the server's /prompt, including queue, executor and cache look-ups.

Import only after the host has started: the adapter for the graph is made in this process, the server is another.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from sa_inject.core.adapter_file import save_adapter
from tests.host.client import Graph, HostClient
from tests.host.server_process import ServerProcess

from ..host import ROOT, comfyui, demo_checkpoint
from ..measure import ratio, spread
from ..report import Row, device_slug, environment, publish
from ..scenes import DEMO_SIDE, Scene, load_model

COLUMNS = ("graph", "seconds", "ratio", "at most", "spread")
STEPS = 20
GRAPHS = {"strength 0": {"strength": 0.0}, "clean": {"strength": 1.0}}
AT_MOST = {"strength 0": 1.005}
PICTURE = ROOT / "demo" / "subjects" / "robot" / "01.png"


def graph_overhead(host: Any, repeats: int, quick: bool) -> dict[str, Any]:
    """Plain graphs against injected ones on the demo's base model, each after the same graph with another seed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        for name in ("models/checkpoints", "models/sa_inject", "input"):
            (base / name).mkdir(parents=True)
        shutil.copy(demo_checkpoint(), base / "models" / "checkpoints" / "base.safetensors")
        shutil.copy(PICTURE, base / "input" / "picture.png")
        scene = Scene("demo", load_model("demo", torch.float32), DEMO_SIDE)
        save_adapter(scene.adapter("clean"), base / "models" / "sa_inject" / "bench.safetensors")
        with ServerProcess(comfyui(), base, {"sa-inject": ROOT}) as server:
            rows = measure(server.client, repeats, steps=2 if quick else STEPS)
    result = {
        "geometry": "demo, through /prompt",
        "steps": 2 if quick else STEPS,
        "repeats": repeats,
        "environment": environment(),
        "rows": rows,
    }
    publish("sampling", "Whole graphs through /prompt, demo base", f"graph-{device_slug()}", result, COLUMNS, quick)
    return result


def measure(client: HostClient, repeats: int, steps: int) -> list[Row]:
    seed = iter(range(10**6))

    def run(injection: dict[str, Any] | None) -> float:
        """The executor forgets nodes that the last graph did not contain, so the first run only fills its cache."""
        client.run(graph(next(seed), steps, injection), timeout=600)
        return execution_seconds(client, graph(next(seed), steps, injection))

    rows: list[Row] = [{"graph": "plain"}]
    plain_of_all: list[float] = []
    for name, injection in GRAPHS.items():
        plain, injected = [], []
        for repeat in range(repeats):
            pair = [(plain, None), (injected, injection)]
            for times, what in pair if repeat % 2 == 0 else reversed(pair):
                times.append(run(what))
        plain_of_all += plain
        rows.append(
            {
                "graph": name,
                "seconds": statistics.median(injected),
                "ratio": ratio(injected, plain),
                "at most": AT_MOST.get(name),
                "spread": max(spread(plain), spread(injected)),
                "plain seconds": plain,
                "injected seconds": injected,
            }
        )
    rows[0]["seconds"] = statistics.median(plain_of_all)
    return rows


def execution_seconds(client: HostClient, what: Graph) -> float:
    """Seconds between the host's own time stamps of start and success."""
    messages = client.wait(client.queue(what), timeout=600)["status"]["messages"]
    stamps = {kind: data["timestamp"] for kind, data in messages if "timestamp" in data}
    return (stamps["execution_success"] - stamps["execution_start"]) / 1000


def graph(seed: int, steps: int, injection: dict[str, Any] | None) -> Graph:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    nodes = {
        "base": node("CheckpointLoaderSimple", ckpt_name="base.safetensors"),
        "positive": node("CLIPTextEncode", clip=["base", 1], text="a large toy on the left, red background"),
        "negative": node("CLIPTextEncode", clip=["base", 1], text=""),
        "latent": node("EmptyLatentImage", width=DEMO_SIDE, height=DEMO_SIDE, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["base" if injection is None else "apply", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["base", 2]),
        "show": node("PreviewImage", images=["decode", 0]),
    }
    if injection is None:
        return nodes
    return nodes | {
        "adapter": node("LoadSAInjectAdapter", adapter_name="bench.safetensors", write_embedding=False),
        "picture": node("LoadImage", image="picture.png"),
        "prompt": node("EncodeImagePrompt", images=["picture", 0], vae=["base", 2], resolution=DEMO_SIDE, fit="crop"),
        "apply": node(
            "ApplySelfAttnInjection",
            model=["base", 0],
            adapter=["adapter", 0],
            image_prompt=["prompt", 0],
            start_percent=0.0,
            end_percent=1.0,
            apply_to="positive",
            blocks="all",
            **injection,
        ),
    }
