"""A batch of four pictures with four captions is the step of four pictures one after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.host.trainings import Checkpoint, pictures

STEPS = 2
CAPTIONS = ["a sainj toy on grass", "sainj", "one small red sainj toy before a white wall", "a drawing of sainj"]


@pytest.fixture(scope="module")
def learned(pack_nodes, sd15: Checkpoint) -> Callable[..., tuple[list[float], list[torch.Tensor]]]:
    """`learned(take, ...)`: losses and values after some steps. `take` gets the loop before its first step."""
    from sa_inject.nodes.host.learning.training import AdapterTraining
    from sa_inject.nodes.host.learning.training_set import Subject
    from sa_inject.trainer.config import TrainConfig

    def train(take: Callable[[Any], None], **settings) -> tuple[list[float], list[torch.Tensor]]:
        given = [picture.movedim(-1, 0)[None] for picture in pictures(4)]
        left = torch.zeros(64, 64)
        left[:, :40] = 1
        subject = Subject(given, [None, left, None, None], CAPTIONS, "sainj", "toy", 64)
        config = TrainConfig(steps=STEPS, rank=2, alpha=2.0, lora_learning_rate=1e-2, average_power=None, **settings)
        with torch.inference_mode():
            training = AdapterTraining(*sd15, subject, config, precision="fp32")
            with training.prepare():
                loop = training.loop()
                take(loop)
                losses = [step.loss for step in loop]
                values = [*training.lora.parameters(), *training.tokens.values()]
                return losses, [value.detach().clone() for value in values]

    return train


@pytest.mark.parametrize("mode", ["clean", "noised"])
def test_batch_of_four_is_four_accumulated_steps(learned, mode):
    from sa_inject.trainer.batches import Batch

    rows: list[Any] = []
    captions: list[set[str]] = []

    def note(loop: Any) -> None:
        """Keep the pictures, noise levels and noise of every batch."""
        draw = loop._batches.draw

        def noted() -> Batch:
            batch = draw()
            groups = list(batch.groups)
            captions.append({pair.caption for group in groups for pair in group.pairs})
            rows.extend(group.rows([row]) for group in groups for row in range(len(group.pairs)))
            return Batch(batch.size, iter(groups))

        loop._batches.draw = noted

    def replay(loop: Any) -> None:
        """The same, one at a time."""
        loop._batches.draw = lambda: Batch(1, iter([rows.pop(0)]))

    losses, values = learned(note, batch_size=4, reference_mode=mode)
    assert [len(said) for said in captions] == [4] * STEPS and len(rows) == 4 * STEPS
    accumulated, same_values = learned(replay, gradient_accumulation=4, reference_mode=mode)
    assert rows == []
    assert accumulated == pytest.approx(losses, rel=1e-4)
    for value, other in zip(values, same_values, strict=True):
        # Sums in another order differ in the last bits, which Adam divides by the gradient's own size.
        assert (value - other).norm() <= 1e-2 * value.norm()
