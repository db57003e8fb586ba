"""What a step takes beside the loaded models: the estimate from shapes against what torch has allocated at most."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.host.tiny_transformers import tiny_clip, tiny_transformer, tiny_vae

WITHIN = 1.5  # a factor


def allocated_at_most(run: Any) -> int:
    """Bytes, beside those that were allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def measured(parts: tuple[Any, Any, Any], side: int, checkpointing: bool, **settings) -> tuple[float, float]:
    """-> bytes of two steps with references, and their estimate"""
    from sa_inject.nodes.host.learning.training import AdapterTraining
    from sa_inject.nodes.host.learning.training_set import Subject
    from sa_inject.trainer.config import TrainConfig

    pictures = [torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    subject = Subject(pictures, [None] * 2, None, "sainj", "toy", side)
    config = TrainConfig(rank=4, reference_dropout=0.0, reference_start=0.0, **settings)
    with torch.inference_mode():
        training = AdapterTraining(*parts, subject, config, checkpointing=checkpointing, precision="fp32")
        with training.prepare():
            before = sum(4 * parameter.numel() for parameter in training.lora.parameters())

            def two_steps() -> None:
                loop = training.loop()
                training.reference_text = loop.reference_text
                next(loop)
                next(loop)

            most = allocated_at_most(two_steps)
            return before + most, training.step_memory(checkpointing).total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "side", "batch_size"), [("sd15", 64, 1), ("sd15", 192, 2), ("sdxl", 128, 1)])
def test_estimate_of_a_unet_is_near_the_measured_peak(
    pack_nodes, load_checkpoint, kind, side, batch_size, checkpointing
):
    found, estimate = measured(load_checkpoint(kind), side, checkpointing, batch_size=batch_size)
    assert found / WITHIN < estimate < found * WITHIN


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["z_image", "flux_dev"])
def test_estimate_of_a_transformer_is_near_the_measured_peak(pack_nodes, kind, checkpointing):
    clip = tiny_clip({"z_image": "z_image", "flux_dev": "flux"}[kind])
    parts = tiny_transformer(kind), clip, tiny_vae()
    found, estimate = measured(parts, 256, checkpointing, token_learning_rate=0.0)
    assert found / WITHIN < estimate < found * WITHIN
