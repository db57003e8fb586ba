"""Our method with one thing changed at a time. Changes that no node offers are built from the pack's own parts.

Import only after the host has started.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sa_inject.core.lora import LoRADeltas
from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser
from sa_inject.trainer.examples import Pair, PairStream, TrainingSet

from .adapted import ADAPTED_OUTPUT, RECORDER, Replacements, WholePass, lora_on_both, replaced, whole_lora_for
from .injection_variants import BaseProjections, WholeValues, concatenated
from .learn import TrainingSetup, training_setup, with_word
from .methods import learned_adapter, ours, ours_noised, trained_model
from .reference_levels import (
    LightlyNoised,
    ScheduledSampling,
    WithTimestep,
    inputs_with_timestep,
    lightly_noised_inputs,
    lowest_sigma,
    sigma_at,
)
from .subjects import PLACEHOLDER, Subject, make_subject
from .task import TrainedModel, TrainingTask

HOST = "sa_inject.nodes.host"
REFERENCE_INPUTS = (
    f"{HOST}.drawing.reference_pass.reference_inputs",
    f"{HOST}.drawing.patch.reference_inputs",
)
CLEAN_SIGMA = (
    f"{HOST}.drawing.reference_pass.clean_reference_sigma",
    f"{HOST}.learning.denoiser.clean_reference_sigma",
)
THREE_LEVELS = (0.1, 0.3, 0.55)  # fractions of the schedule, within the 0.7 that has references
MAY_JOIN = (f"{HOST}.drawing.batched_reference.ExtendedBatch.can_append",)


def learned(
    task: TrainingTask,
    before: Callable[[TrainingSetup], None] = lambda setup: None,
    trains_token: bool = True,
    denoiser_class: type[ComfyDenoiser] = ComfyDenoiser,
    applied: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainedModel:
    """The node's training, with a change made by `before`, in its denoiser or in its settings.

    applied: inputs of ApplySelfAttnInjection after the training.
    """
    if not trains_token:
        changes["token_learning_rate"] = 0.0
    config = task.config(**changes)
    with training_setup(task.models, task.training_subject(), config, denoiser_class=denoiser_class) as setup:
        before(setup)
        setup.train(setup.lora)
        adapter = setup.adapter()
    return trained_model(task, adapter, with_word(task.models, adapter.token_embedding, PLACEHOLDER), **applied or {})


def whole_lora(task: TrainingTask, **changes: Any) -> TrainedModel:
    """LoRA on all four projections. The recorder decides how they are used."""

    def replace(setup: TrainingSetup) -> None:
        setup.lora = whole_lora_for(setup)

    return learned(task, replace, **changes)


def identical_pairs(task: TrainingTask) -> TrainedModel:
    """The picture that is denoised is its own image prompt."""

    def identical(pair: Pair) -> Pair:
        return pair if pair.reference is None else pair._replace(reference=pair.target)

    return learned(task, with_pairs(identical))


def word_first(task: TrainingTask) -> TrainedModel:
    """No references in the first half of the steps: the token embedding is trained alone."""
    numbers = itertools.count()
    alone = task.settings.steps * task.settings.batch // 2

    def without_at_first(pair: Pair) -> Pair:
        return pair._replace(reference=None) if next(numbers) < alone else pair

    return learned(task, with_pairs(without_at_first))


def with_pairs(change: Callable[[Pair], Pair]) -> Callable[[TrainingSetup], None]:
    """Apply `change` to every pair that the training draws."""

    class Changed(PairStream):
        def __next__(self) -> Pair:
            return change(super().__next__())

    class Data(TrainingSet):
        def pairs(self, reference_dropout: float, generator: torch.Generator) -> PairStream:
            return Changed(self, reference_dropout, generator)

    def replace(setup: TrainingSetup) -> None:
        setup.data = Data(setup.data.examples, setup.data.views)

    return replace


class MiddleAndDecoder(ComfyDenoiser):
    """No injection in the encoder in training. The LoRA of these layers is not trained and has no effect."""

    def read_reference(self, *args: Any, **kwargs: Any) -> Any:
        return {key: found for key, found in super().read_reference(*args, **kwargs).items() if key.stage != "input"}


def decoder_from_the_start(task: TrainingTask) -> TrainedModel:
    """Middle and decoder only, in training and in sampling."""
    return learned(task, denoiser_class=MiddleAndDecoder, applied={"blocks": "middle and decoder"})


def with_reference_text(text_of: Callable[[Subject, int], str]) -> Callable[[TrainingTask], TrainedModel]:
    """Another text for the reference pass than the class word: `text_of(subject, index of the picture)`."""

    def train(task: TrainingTask) -> TrainedModel:
        subject = task.subject
        latents: list[Tensor] = []

        class WithReferenceText(ComfyDenoiser):
            def read_reference(self, latent: Tensor, sigma: Any, text: Any, mask: Any, deltas: LoRADeltas) -> Any:
                indices = [next(p for p, known in enumerate(latents) if torch.equal(known, row)) for row in latent]
                text = self.encode([text_of(subject, index) for index in indices])
                return super().read_reference(latent, sigma, text, mask, deltas)

        with training_setup(
            task.models, task.training_subject(), task.config(), denoiser_class=WithReferenceText
        ) as setup:
            latents.extend(example.latent[0].to(setup.device, torch.float32) for example in setup.data.examples)
            setup.train(setup.lora)
            adapter = setup.adapter()
            with torch.no_grad():
                texts = [setup.denoiser.encode([text_of(subject, p)]) for p in range(len(latents))]
        task.reference_texts = [text.to(torch.device("cpu")) for text in texts]
        return trained_model(task, adapter, with_word(task.models, adapter.token_embedding, PLACEHOLDER))

    return train


def with_timestep(*levels: float) -> Callable[[TrainingTask], TrainedModel]:
    class AtLevels(WithTimestep):
        pass

    AtLevels.levels = levels
    return lambda task: learned(task, denoiser_class=AtLevels, reference_mode="noised")


def with_references(count: int) -> Callable[[TrainingTask], TrainedModel]:
    def train(task: TrainingTask) -> TrainedModel:
        task.subject = make_subject(task.subject.artwork, references=count)
        return ours(task)

    return train


def drawn_with(cfg: float | None = None, **changes: Any) -> Callable[[TrainingTask], TrainedModel]:
    """The unchanged adapter with other inputs of Apply. It is trained once per subject."""

    def train(task: TrainingTask) -> TrainedModel:
        adapter, clip = learned_once(task)
        task.settings = task.settings._replace(cfg=cfg or task.settings.cfg)
        return trained_model(task, adapter, clip, **changes)

    return train


_learned: dict[tuple, tuple[Any, Any]] = {}


def learned_once(task: TrainingTask) -> tuple[Any, Any]:
    """Adapter and CLIP. Those of the last subject are kept."""
    key = (task.subject, task.settings, task.rate, task.word_rate)
    if key not in _learned:
        _learned.clear()
        _learned[key] = learned_adapter(task)
    return _learned[key]


ABLATIONS: dict[str, Callable[[TrainingTask], TrainedModel]] = {
    "as it is": drawn_with(),
    "LoRA in the whole pass": whole_lora,
    "LoRA in the whole pass, noised": lambda task: whole_lora(task, reference_mode="noised"),
    "K and V, in the whole pass": ours,
    **{f"rank {rank}": lambda task, rank=rank: ours(task, rank=rank) for rank in (1, 4, 64)},
    **{f"word of {n} tokens": lambda task, n=n: ours(task, token_vectors=n) for n in (1, 2, 8)},
    "last step, not averaged": lambda task: learned(task, average_power=None),
    "word not learned": lambda task: learned(task, trains_token=False),
    "word first": word_first,
    "no LoRA": lambda task: learned(task, lora_learning_rate=0.0),
    "projected by the base": whole_lora,
    "concatenated": ours,
    "whole values, added": ours,
    "encoder only": drawn_with(blocks="encoder"),
    "middle and decoder only": drawn_with(blocks="middle and decoder"),
    "middle and decoder only, trained so": decoder_from_the_start,
    "references read with the word": with_reference_text(lambda subject, index: subject.phrase),
    "references read with their captions": with_reference_text(
        lambda subject, index: subject.captions(subject.phrase)[index]
    ),
    "references lightly noised": lambda task: learned(task, denoiser_class=LightlyNoised),
    "references read as clean": ours,
    **{f"references read at {share}": ours for share in (0.1, 0.5)},
    "references told the picture's level": with_timestep(),
    "references told one of 3 levels": with_timestep(*THREE_LEVELS),
    "noised": ours_noised,
    "own beginnings": lambda task: learned(task, denoiser_class=ScheduledSampling),
    "LoRA on both": lora_on_both,
    "LoRA on both, noised": lambda task: lora_on_both(task, reference_mode="noised"),
    "LoRA on the UNet alone": lambda task: lora_on_both(task, reference_dropout=1.0),
    "identical pairs": identical_pairs,
    "both rows": drawn_with(apply_to="both"),
    "both rows, middle and decoder": drawn_with(apply_to="both", blocks="middle and decoder"),
    "strength 0.5, middle and decoder": drawn_with(strength=0.5, blocks="middle and decoder"),
    **{
        f"references from {start}": lambda task, start=start: learned(
            task, applied={"start_percent": start}, reference_start=start
        )
        for start in (0.0, 0.5)
    },
    **{
        f"reference dropout {share}": lambda task, share=share: learned(task, reference_dropout=share)
        for share in (0.0, 0.3, 0.5)
    },
    **{
        f"noised, reference dropout {share}": lambda task, share=share: learned(
            task, reference_dropout=share, reference_mode="noised"
        )
        for share in (0.0, 0.5)
    },
    **{f"{count} references": with_references(count) for count in (1, 2, 8)},
    **{f"strength {strength}": drawn_with(strength=strength) for strength in (0.25, 0.5, 0.7, 2.0, 4.0)},
    **{f"cfg {cfg}": drawn_with(cfg) for cfg in (2.0, 4.5, 7.0)},
    **{f"cfg {cfg}, both rows": drawn_with(cfg, apply_to="both") for cfg in (4.5, 7.0)},
}

# What is replaced in training and in sampling.
CONCATENATED: Replacements = (((f"{HOST}.learning.denoiser.inject", f"{HOST}.drawing.injected.inject"), concatenated),)
WHOLE_PASS: Replacements = ((RECORDER, WholePass), ADAPTED_OUTPUT)
REPLACED: dict[str, Replacements] = {
    "LoRA in the whole pass": WHOLE_PASS,
    "LoRA in the whole pass, noised": (*WHOLE_PASS, (MAY_JOIN, lambda *_: False)),
    "K and V, in the whole pass": WHOLE_PASS,
    "projected by the base": ((RECORDER, BaseProjections), ADAPTED_OUTPUT, *CONCATENATED),
    "concatenated": ((RECORDER, WholeValues), *CONCATENATED),
    "no LoRA": ((RECORDER, WholeValues), *CONCATENATED),
    "whole values, added": ((RECORDER, WholeValues),),
    "references lightly noised": (((f"{HOST}.drawing.reference_pass.reference_inputs",), lightly_noised_inputs),),
    "references read as clean": ((CLEAN_SIGMA, lowest_sigma),),
    "references told the picture's level": ((REFERENCE_INPUTS, inputs_with_timestep(())),),
    "references told one of 3 levels": ((REFERENCE_INPUTS, inputs_with_timestep(THREE_LEVELS)),),
    **{f"references read at {share}": ((CLEAN_SIGMA, sigma_at(share)),) for share in (0.1, 0.5)},
}


def as_changed(name: str) -> contextlib.AbstractContextManager[None]:
    return replaced(*REPLACED.get(name, ()))
