"""Ours with LoRA on the whole of a self-attention: in the reference pass, and in the UNet that draws.

Import only once the host is started.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sa_inject.core.attention import Attention, differentiable_attention
from sa_inject.core.injection import inject
from sa_inject.core.lora import LoRADeltas, SelfAttentionLoRA
from sa_inject.core.reference import HIDDEN_STATES_KEY, ReferencePassHooks, block_key
from sa_inject.nodes.host.learning.autograd import differentiable_options
from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser
from sa_inject.nodes.host.networks.unet import model_conditions

from .learn import TrainingSetup, training_setup, with_word
from .methods import PLACEHOLDER, TrainedModel, TrainingTask, trained_model

ATTENDED = "bench_attended"
Replacements = tuple[tuple[tuple[str, ...], Any], ...]
HOST = "sa_inject.nodes.host"
RECORDER = (
    f"{HOST}.drawing.reference_pass.ReferencePassHooks",
    f"{HOST}.learning.denoiser.ReferencePassHooks",
)


@contextlib.contextmanager
def replaced(*changes: tuple[tuple[str, ...], Any]) -> Iterator[None]:
    """Other objects at the given places, for as long as this lasts."""
    with contextlib.ExitStack() as undo:
        for places, by in changes:
            for place in places:
                undo.enter_context(mock.patch(place, by))
        yield


class WholeLoRA(SelfAttentionLoRA):
    projections = ("to_q", "to_k", "to_v", "to_out.0")


class WholePass(ReferencePassHooks):
    """Adapts what a layer passes on to the next as well: by `own`, or else by what adapts the keys and values."""

    def __init__(
        self,
        wanted: Any,
        last: Any,
        deltas: LoRADeltas,
        attend: Attention,
        stop_early: bool = True,
        own: LoRADeltas | None = None,
        **more: Any,
    ) -> None:
        super().__init__(wanted, last, deltas, attend, stop_early, **more)
        self._own = deltas if own is None else own

    def transformer_options(self, blocks: Any) -> dict[str, Any]:
        options = super().transformer_options(blocks)
        options["patches"]["attn1_output_patch"] = [self._adapt_output]
        return options

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        self._record(k, v, extra_options)
        projected = {"to_q": q, "to_k": k, "to_v": v}
        q, k, v = (
            self._adapted(x, extra_options[HIDDEN_STATES_KEY], name, extra_options) for name, x in projected.items()
        )
        attended = extra_options[ATTENDED] = self._attend_to(q, k, v, extra_options)
        return attended

    def _attend_to(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return self._attend(q, k, v, extra_options["n_heads"])

    def _adapt_output(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return self._adapted(out, extra_options[ATTENDED], "to_out.0", extra_options)

    def _adapted(self, projected: Tensor, x: Tensor, projection: str, extra_options: dict[str, Any]) -> Tensor:
        delta = self._own.get((block_key(extra_options), projection))
        return projected if delta is None else projected + delta(x)


def whole_lora_for(setup: TrainingSetup) -> WholeLoRA:
    """A fresh one, on the room's device."""
    generator = torch.Generator().manual_seed(setup.config.seed)
    lora = WholeLoRA(setup.description.layers, setup.config.rank, setup.config.alpha, generator)
    lora.to(setup.device)
    return lora


class AdaptedUnet(ComfyDenoiser):
    """The frozen UNet's own self-attention gets a LoRA of its own too, which the copy shares."""

    own: SelfAttentionLoRA

    def read_reference(self, latent: Tensor, sigma: Any, text: Any, mask: Any, deltas: LoRADeltas) -> Any:
        own = self.own.deltas(latent.device, torch.float32)
        with replaced((RECORDER, functools.partial(WholePass, own=own))):
            return super().read_reference(latent, sigma, text, mask, deltas)

    def denoise(self, noisy: Tensor, sigma: Tensor, text: Any, references: Any) -> Tensor:
        recorder = _Injecting(self._blocks[-1], self.own.deltas(noisy.device, torch.float32), references)
        options = {**differentiable_options(), **recorder.transformer_options(self._blocks)}
        conditions = model_conditions(self._base, noisy, text)
        return self._base.apply_model(noisy, sigma, transformer_options=options, **conditions)


class _Injecting(WholePass):
    """Adapts every self-attention of a whole UNet call, and injects where there is something to inject."""

    def __init__(self, last: Any, own: LoRADeltas, references: Any) -> None:
        super().__init__((), last, {}, differentiable_attention, stop_early=False, own=own)
        self._references = references

    def _attend_to(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        attended = super()._attend_to(q, k, v, extra_options)
        if self._references is None:
            return attended
        reference = self._references[block_key(extra_options)]
        return inject(attended, q, [reference], extra_options["n_heads"], differentiable_attention)


def lora_on_both(task: TrainingTask, **changes: Any) -> TrainedModel:
    """A second LoRA on the frozen UNet's self-attention, merged into its weights for drawing."""
    config = task.config(**changes)
    with training_setup(task.models, task.training_subject(), config, denoiser_class=AdaptedUnet) as setup:
        own = whole_lora_for(setup)
        setup.denoiser.own = own  # type: ignore[attr-defined]
        both = _Both(setup.lora, own)
        setup.learn(both)
        adapter = setup.adapter()
        with torch.no_grad():
            products = own.deltas(torch.device("cpu"), torch.float32)
            paths = {layer.key: layer.path for layer in setup.description.layers}
            differences = {
                f"{paths[key]}.{projection}.weight": product.b @ product.a
                for (key, projection), product in products.items()
            }
    patches = {f"diffusion_model.{name}": ("diff", (value,)) for name, value in differences.items()}
    trained = trained_model(task, adapter, with_word(task.models, adapter.token_embedding, PLACEHOLDER))
    trained.model.add_patches(patches)
    more = sum(parameter.numel() for parameter in own.parameters())
    return trained._replace(parameters=trained.parameters + more, file_bytes=trained.file_bytes + 2 * more)


class _Both:
    def __init__(self, lora: SelfAttentionLoRA, own: SelfAttentionLoRA) -> None:
        self.deltas = lora.deltas
        self._all = [*lora.parameters(), *own.parameters()]

    def parameters(self) -> list:
        return self._all
