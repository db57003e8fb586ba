"""Memory that an image prompt and a training add to full-size diffusion transformers, computed from layer shapes.

Nothing is run: the models are built without weights, on torch's `meta` device.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

from bench.host import start_host

GIB = 2**30
BF16, FP32 = 2, 4
DRAWN, REFERENCE = 1024, 512  # pixels
PIXELS_PER_TOKEN = 16
RANK = 16
TEXT = {"Z-Image": 128, "Flux.1": 256}  # tokens of a typical prompt, as the network gets it
ENCODER = {"Z-Image": 4.02e9, "Flux.1": 4.76e9 + 0.12e9}  # parameters: Qwen3-4B; T5-XXL and CLIP-L


class Row(NamedTuple):
    """One model. Sizes in GiB, in bf16 unless it says otherwise."""

    model: str
    weights: float
    lora: float  # in float32, with its gradient, both moments of AdamW, and the average
    bank: float  # of one reference: keys, and values at the LoRA's rank
    bank_with_whole_values: float
    extra_work: float  # multiply-adds of a step relative to the base's, as a fraction
    kept_with_checkpointing: float  # inputs of all blocks; keys, values and LoRA inputs of the reference
    training: float  # weights, LoRA and stored activations; without one block's own activations
    training_with_encoder: float  # if the token embedding is trained


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    start_host()
    rows = [row_of(name) for name in TEXT]
    print("| " + " | ".join(name.replace("_", " ") for name in Row._fields) + " |")
    print("| " + " | ".join("---" for _ in Row._fields) + " |")
    for row in rows:
        print("| " + " | ".join([row.model, *(f"{value:.2f}" for value in row[1:])]) + " |")
    print(json.dumps([row._asdict() for row in rows]))


def row_of(name: str) -> Row:
    from sa_inject.nodes.host.networks.registry import describe
    from tests.host.full_size_transformers import on_meta

    model = on_meta(name)
    network: Any = model.model.diffusion_model
    layers = describe(model).layers
    n, m = ((side // PIXELS_PER_TOKEN) ** 2 for side in (DRAWN, REFERENCE))
    sequence = n + TEXT[name]
    weights = sum(parameter.numel() for parameter in network.parameters())
    lora = sum(2 * RANK * (layer.query_dim + layer.inner_dim) for layer in layers)
    keys = m * sum(layer.inner_dim for layer in layers)
    read = m * sum(layer.query_dim for layer in layers)
    attention = sum(2 * sequence**2 * layer.inner_dim for layer in layers)
    added = sum(2 * n * m * layer.inner_dim + m * RANK * layer.inner_dim for layer in layers)
    inputs = sum(sequence * layer.query_dim for layer in layers)
    kept = (inputs + 2 * keys + read) * BF16
    training = weights * BF16 + lora * FP32 * 5 + kept
    return Row(
        name,
        weights * BF16 / GIB,
        lora * FP32 * 5 / GIB,
        (keys + m * RANK * len(layers)) * BF16 / GIB,
        2 * keys * BF16 / GIB,
        added / (weights * sequence + attention),
        kept / GIB,
        training / GIB,
        (training + ENCODER[name] * BF16) / GIB,
    )
