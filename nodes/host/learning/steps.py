"""Take the steps of one training: with checkpoints, samples, validation, and retries after out of memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import comfy.model_management as model_management
import torch

from ....core.adapter import Adapter
from ....trainer.loop import DivergedError, Step, Training
from ....trainer.settings import NEVER
from ....trainer.validation import Validation
from ....trainer.watch import Watch
from .checkpoint import TrainingCheckpoint

OUT_OF_MEMORY = (model_management.OOM_EXCEPTION, MemoryError)


class Steps:
    """The remaining steps of a training."""

    def __init__(
        self,
        training: Training,
        checkpoint: TrainingCheckpoint,
        validation: Validation,
        watch: Watch,
        *,
        released: Callable[[], contextlib.AbstractContextManager[None]],
        build: Callable[[], Adapter],
        save_memory: Callable[[], str | None],
        device: torch.device,
    ) -> None:
        """released: a context in which other nodes can use the models. build: the current adapter.

        save_memory: uses less memory from now on, and returns how; None if nothing is left to do.
        """
        self._training, self._checkpoint, self._validation, self._watch = training, checkpoint, validation, watch
        self._released, self._build, self._save_memory, self._device = released, build, save_memory, device

    def take_all(self, steps: int) -> None:
        """Take steps up to `steps`. A checkpoint is saved at the end, also after any exception but DivergedError."""
        training, checkpoint, watch = self._training, self._checkpoint, self._watch
        wanted = None
        try:
            if not training.losses:
                self._evaluate(0)
            watch.enter("training")
            while len(training.losses) < steps:
                step = self._next()
                checkpoint.on_step(training)
                watch.on_step(step, training)
                if watch.wants_finish():
                    wanted = steps if step.number < steps else None
                    break
                if step.number < steps:
                    self._evaluate(step.number)
        except DivergedError:
            checkpoint.discard_stopped()
            raise
        except BaseException:
            checkpoint.save(training)
            raise
        watch.enter("saving")
        checkpoint.save(training, is_finished=True, wanted=wanted)
        self._evaluate(len(training.losses), is_last=True)
        training.apply_average()

    def _evaluate(self, step: int, is_last: bool = False) -> None:
        """Validate and draw samples, if they are due at this step."""
        draws = self._watch.wants_sample(step, is_last)
        every = self._watch.settings.validation_every
        if draws if every == 0 else every != NEVER and (is_last or step % every == 0):
            self._watch.enter("validating")
            self._watch.on_validation(step, self._validation.measure(self._training, self._device))
        if draws:
            self._watch.enter("sampling")
            with self._training.averaged():
                adapter = self._build()
            with self._released():
                self._watch.draw(step, adapter, is_last)
        self._watch.enter("saving" if is_last else "training")

    def _next(self) -> Step:
        while True:
            try:
                return next(self._training)
            except OUT_OF_MEMORY as error:
                kind, text = type(error), str(error)
            # After the except clause, because the traceback keeps tensors alive.
            self._save_memory_or_raise(kind, text)

    def _save_memory_or_raise(self, kind: type[BaseException], text: str) -> None:
        self._training.rewind()
        gc.collect()
        model_management.soft_empty_cache()
        step = len(self._training.losses) + 1
        done = self._save_memory()
        if done is None:
            raise kind(
                f"The memory did not last for step {step}, with gradient checkpointing and one picture at a time "
                f"({text}). The {step - 1} steps before it are kept. Lower the resolution, close other programs, "
                "or start ComfyUI with --lowvram, and queue the same again."
            )
        self._watch.warn([f"The memory did not last for step {step}: it is taken again {done}."])
