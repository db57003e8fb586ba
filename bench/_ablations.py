"""Ours with one thing changed at a time. What no node offers is built here, from the pack's own parts.

Import only once the host is started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from _learn import Room, classroom, with_word
from _methods import PLACEHOLDER, Lesson, Taught, learned_adapter, ours, taught_by
from _subjects import REFERENCES, make_subject
from torch import Tensor

from sa_inject.core.attention import Attention, differentiable_attention
from sa_inject.core.injection import Reference, inject
from sa_inject.core.kv import KV
from sa_inject.core.lora import Deltas, SelfAttentionLoRA
from sa_inject.core.reference import HIDDEN, Recorded, ReferencePassComplete, ReferenceRecorder, block_key
from sa_inject.nodes.host.denoiser import ComfyDenoiser
from sa_inject.nodes.host.trainable import differentiable_options
from sa_inject.nodes.host.unet import model_conditions
from sa_inject.trainer.examples import Pair, TrainingSet

INJECT = ("sa_inject.nodes.host.patch.inject", "sa_inject.nodes.host.denoiser.inject")
RECORDER = ("sa_inject.nodes.host.bank.ReferenceRecorder", "sa_inject.nodes.host.denoiser.ReferenceRecorder")


def learned(
    lesson: Lesson, before: Callable[[Room], None] = lambda room: None, word_learns: bool = True, **changes: Any
) -> Taught:
    """The same training as the node's, with something changed `before` it, or in its settings."""
    if not word_learns:
        changes["token_learning_rate"] = 0.0
    with classroom(lesson.models, lesson.training_subject(), lesson.config()) as room:
        before(room)
        room.learn(room.lora, **changes)
        adapter = room.adapter()
    return taught_by(lesson, adapter, with_word(lesson.models, adapter.tokens, PLACEHOLDER))


def only_keys_and_values(lesson: Lesson) -> Taught:
    def freeze(room: Room) -> None:
        for name, parameter in room.lora.named_parameters():
            parameter.requires_grad_("to_k" in name or "to_v" in name)

    return learned(lesson, freeze)


def identical_pairs(lesson: Lesson) -> Taught:
    """The picture that is denoised is its own image prompt."""

    class Identical(TrainingSet):
        def pairs(self, reference_dropout: float, generator: torch.Generator) -> Iterator[Pair]:
            for pair in super().pairs(reference_dropout, generator):
                yield pair if pair.reference is None else pair._replace(reference=pair.target)

    def replace(room: Room) -> None:
        room.data = Identical(room.data.examples, room.data.views)

    return learned(lesson, replace)


class BaseProjections(ReferenceRecorder):
    """Hands over what the frozen weights project, from hidden states that the LoRA has changed (as BootPIG tried)."""

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        key = block_key(extra_options)
        if key in self._wanted:
            height, width = extra_options["activations_shape"][-2:]
            self.bank.setdefault(key, Recorded(KV(k, v), height, width))
        return super()._attention(q, k, v, extra_options)


class FrozenTrunk(ReferenceRecorder):
    """Adapts the keys and values that are handed over, and nothing on the way there: no gradient runs through the pass,
    and what it computes of a picture does not change while the LoRA learns."""

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        key = block_key(extra_options)
        if key in self._wanted:
            hidden = extra_options[HIDDEN].detach()
            height, width = extra_options["activations_shape"][-2:]
            adapted = KV(self._adapted(k.detach(), hidden, key, "to_k"), self._adapted(v.detach(), hidden, key, "to_v"))
            self.bank.setdefault(key, Recorded(adapted, height, width))
        if self._stop_early and key == self._last:
            raise ReferencePassComplete
        return self._attend(q, k, v, extra_options["n_heads"])

    def _adapt_output(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return out


def decoupled(q: Tensor, own: KV, references: list[Reference], heads: int, attend: Attention) -> Tensor:
    """Two softmaxes that are added, in place of one over both (IP-Adapter's way)."""
    out = attend(q, own.k, own.v, heads)
    for reference in references:
        k, v = (x.expand(q.shape[0], *x.shape[1:]).to(q) for x in reference.kv)
        out = out + attend(q, k, v, heads) / len(references)
    return out


@contextlib.contextmanager
def replaced(places: tuple[str, ...], by: Any) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for place in places:
            undo.enter_context(mock.patch(place, by))
        yield


class AdaptedUnet(ComfyDenoiser):
    """The frozen UNet's own self-attention gets a LoRA of its own too, which the copy shares."""

    own: SelfAttentionLoRA

    def read_reference(self, latent: Tensor, sigma: Any, text: Any, mask: Any, deltas: Deltas) -> Any:
        shared = self.own.deltas(latent.device, torch.float32)
        both: Any = {address: _Sum(delta, shared[address]) for address, delta in deltas.items()}
        return super().read_reference(latent, sigma, text, mask, both)

    def denoise(self, noisy: Tensor, sigma: Tensor, text: Any, references: Any) -> Tensor:
        recorder = _Adapts((), self._blocks[-1], self.own.deltas(noisy.device, torch.float32), references)
        options = {**differentiable_options(), **recorder.transformer_options(self._blocks)}
        conditions = model_conditions(self._base, noisy, text)
        return self._base.apply_model(noisy, sigma, transformer_options=options, **conditions)


class _Sum:
    def __init__(self, *products: Any) -> None:
        self._products = products

    def __call__(self, x: Tensor) -> Tensor:
        return sum(product(x) for product in self._products)  # type: ignore[return-value]


class _Adapts(ReferenceRecorder):
    """Adapts every self-attention of a whole UNet call, and injects where there is something to inject."""

    def __init__(self, wanted: Any, last: Any, deltas: Deltas, references: Any) -> None:
        super().__init__(wanted, last, deltas, differentiable_attention, stop_early=False)
        self._references = references

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        if self._references is not None:
            reference = self._references[block_key(extra_options)]
            self._attend = lambda q, k, v, heads: inject(q, KV(k, v), [reference], heads, differentiable_attention)
        return super()._attention(q, k, v, extra_options)


def lora_on_both(lesson: Lesson) -> Taught:
    """A second LoRA on the frozen UNet's self-attention, merged into its weights for drawing."""
    with classroom(lesson.models, lesson.training_subject(), lesson.config(), denoiser_class=AdaptedUnet) as room:
        own = room.denoiser.own = SelfAttentionLoRA(room.description.layers, room.config.rank, room.config.alpha)  # type: ignore[attr-defined]
        own.to(room.device)
        both = _Both(room.lora, own)
        room.learn(both)
        adapter = room.adapter()
        with torch.no_grad():
            products = own.deltas(torch.device("cpu"), torch.float32)
            paths = {layer.key: layer.path for layer in room.description.layers}
            differences = {
                f"{paths[key]}.{projection}.weight": product.b @ product.a
                for (key, projection), product in products.items()
            }
    patches = {f"diffusion_model.{name}": ("diff", (value,)) for name, value in differences.items()}
    taught = taught_by(lesson, adapter, with_word(lesson.models, adapter.tokens, PLACEHOLDER))
    taught.model.add_patches(patches)
    more = sum(parameter.numel() for parameter in own.parameters())
    return taught._replace(parameters=taught.parameters + more, file_bytes=taught.file_bytes + 2 * more)


class _Both:
    def __init__(self, lora: SelfAttentionLoRA, own: SelfAttentionLoRA) -> None:
        self.deltas = lora.deltas
        self._all = [*lora.parameters(), *own.parameters()]

    def parameters(self) -> list:
        return self._all


def with_references(count: int) -> Callable[[Lesson], Taught]:
    def teach(lesson: Lesson) -> Taught:
        lesson.subject = make_subject(lesson.subject.artwork, references=count)
        return ours(lesson)

    return teach


def drawn_with(cfg: float | None = None, **changes: Any) -> Callable[[Lesson], Taught]:
    """The adapter as it is, applied otherwise; so it is learned only once for a subject."""

    def teach(lesson: Lesson) -> Taught:
        adapter, clip = learned_once(lesson)
        lesson.settings = lesson.settings._replace(cfg=cfg or lesson.settings.cfg)
        return taught_by(lesson, adapter, clip, **changes)

    return teach


_learned: dict[tuple, tuple[Any, Any]] = {}


def learned_once(lesson: Lesson) -> tuple[Any, Any]:
    """Adapter and CLIP; those of the last subject are kept."""
    key = (lesson.subject, lesson.settings, lesson.rate, lesson.word_rate)
    if key not in _learned:
        _learned.clear()
        _learned[key] = learned_adapter(lesson)
    return _learned[key]


ABLATIONS: dict[str, Callable[[Lesson], Taught]] = {
    "as it is": drawn_with(),
    "K and V only": only_keys_and_values,
    "K and V only, frozen trunk": ours,
    **{f"rank {rank}": lambda lesson, rank=rank: ours(lesson, rank=rank) for rank in (1, 4, 64)},
    "word not learned": lambda lesson: learned(lesson, word_learns=False),
    "no LoRA": lambda lesson: learned(lesson, lora_learning_rate=0.0),
    "projected by the base": ours,
    "decoupled": ours,
    "encoder only": drawn_with(blocks="encoder"),
    "middle and decoder only": drawn_with(blocks="middle and decoder"),
    "LoRA on both": lora_on_both,
    "identical pairs": identical_pairs,
    "both rows": drawn_with(rows="both"),
    "no reference dropout": lambda lesson: learned(lesson, reference_dropout=0.0),
    "reference dropout 0.3": lambda lesson: learned(lesson, reference_dropout=0.3),
    **{f"{count} references": with_references(count) for count in (1, 2, 8)},
    "references add up": drawn_with(strength=float(REFERENCES)),
    **{f"strength {strength}": drawn_with(strength=strength) for strength in (0.5, 2.0)},
    **{f"cfg {cfg}": drawn_with(cfg) for cfg in (2.0, 4.5, 7.0)},
    **{f"cfg {cfg}, both rows": drawn_with(cfg, rows="both") for cfg in (4.5, 7.0)},
}

# What has to be in place while teaching and while drawing.
REPLACED: dict[str, tuple[tuple[str, ...], Any]] = {
    "K and V only, frozen trunk": (RECORDER, FrozenTrunk),
    "projected by the base": (RECORDER, BaseProjections),
    "decoupled": (INJECT, decoupled),
}


def as_changed(name: str) -> contextlib.AbstractContextManager[None]:
    return replaced(*REPLACED[name]) if name in REPLACED else contextlib.nullcontext()
