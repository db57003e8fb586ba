"""Our method with LoRA on all projections of self-attention: in the reference pass, and in the UNet itself.

Import only after the host has started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sa_inject.core.injection import inject
from sa_inject.core.kv import BlockKey
from sa_inject.core.lora import LoRADeltas, SelfAttentionLoRA
from sa_inject.core.reference import KVRecorder
from sa_inject.core.site import AtSite, Site
from sa_inject.nodes.host.learning.autograd import differentiable_options
from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser
from sa_inject.nodes.host.networks.unet import model_conditions
from sa_inject.nodes.host.networks.unet_sites import attending

from .learn import TrainingSetup, training_setup, with_word
from .methods import trained_model
from .subjects import PLACEHOLDER
from .task import TrainedModel, TrainingTask

Replacements = tuple[tuple[tuple[str, ...], Any], ...]
HOST = "sa_inject.nodes.host"
RECORDER = (
    f"{HOST}.drawing.reference_pass.KVRecorder",
    f"{HOST}.learning.denoiser.KVRecorder",
)
ATTENDING = (
    f"{HOST}.drawing.reference_call.attending",
    f"{HOST}.learning.denoiser.attending",
)


@contextlib.contextmanager
def replaced(*changes: tuple[tuple[str, ...], Any]) -> Iterator[None]:
    """Replace the named objects inside the context."""
    with contextlib.ExitStack() as undo:
        for places, by in changes:
            for place in places:
                undo.enter_context(mock.patch(place, by))
        yield


class WholeLoRA(SelfAttentionLoRA):
    projections = ("to_q", "to_k", "to_v", "to_out.0")


class WholePass(KVRecorder):
    """Also adapts the layer's own attention, by `own` or by the LoRA of the keys and values."""

    def __init__(
        self, wanted: Collection[BlockKey], deltas: LoRADeltas, *, own: LoRADeltas | None = None, **more: Any
    ) -> None:
        super().__init__(wanted, deltas, **more)
        self._own = deltas if own is None else own
        self._attended: dict[BlockKey, Tensor] = {}  # input of the layer's output projection

    def at(self, site: Site) -> Tensor:
        self.record(site)
        q, k, v = (
            self._adapted(x, site.hidden, name, site.key)
            for name, x in (("to_q", site.q), ("to_k", site.k), ("to_v", site.v))
        )
        attended = self._attended[site.key] = self._attend(dataclasses.replace(site, q=q, k=k, v=v))
        return attended

    def _attend(self, site: Site) -> Tensor:
        return site.self_attention()

    def adapt_output(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """An attn1_output_patch."""
        (stage, index), depth = extra_options["block"], extra_options["block_index"]
        key = BlockKey(stage, index, depth)
        return self._adapted(out, self._attended.pop(key), "to_out.0", key)

    def _adapted(self, projected: Tensor, x: Tensor | None, projection: str, key: BlockKey) -> Tensor:
        delta = self._own.get((key, projection))
        return projected if delta is None else projected + delta(x)


@contextlib.contextmanager
def attending_with_adapted_output(
    network: Any, options: dict[str, Any], at: AtSite, blocks: Collection[BlockKey], size: Any = None, **more: Any
) -> Iterator[dict[str, Any]]:
    """Replaces the pack's `attending`: the recorder of a whole pass also changes each layer's output."""
    recorder = getattr(at, "__self__", None)
    with attending(network, options, at, blocks, **more) as options:
        if isinstance(recorder, WholePass):
            patches = {**options["patches"], "attn1_output_patch": [recorder.adapt_output]}
            options = {**options, "patches": patches}
        yield options


ADAPTED_OUTPUT = (ATTENDING, attending_with_adapted_output)


def whole_lora_for(setup: TrainingSetup) -> WholeLoRA:
    """A new LoRA on the setup's device."""
    generator = torch.Generator().manual_seed(setup.config.seed)
    lora = WholeLoRA(setup.description.layers, setup.config.rank, setup.config.alpha, generator)
    lora.to(setup.device)
    return lora


class AdaptedUnet(ComfyDenoiser):
    """The frozen UNet's self-attention gets a second LoRA, which the reference pass uses too."""

    own: SelfAttentionLoRA

    def read_reference(self, latent: Tensor, sigma: Any, text: Any, mask: Any, deltas: LoRADeltas) -> Any:
        own = self.own.deltas(latent.device, torch.float32)
        with replaced((RECORDER, functools.partial(WholePass, own=own)), ADAPTED_OUTPUT):
            return super().read_reference(latent, sigma, text, mask, deltas)

    def denoise(self, noisy: Tensor, sigma: Tensor, text: Any, references: Any) -> Tensor:
        recorder = _Injecting(self.own.deltas(noisy.device, torch.float32), references)
        conditions = model_conditions(self._base, noisy, text)
        network, given = self._base.diffusion_model, differentiable_options()
        with attending_with_adapted_output(network, given, recorder.at, self._blocks, keeps_hidden=True) as options:
            return self._base.apply_model(noisy, sigma, transformer_options=options, **conditions)


class _Injecting(WholePass):
    """Adapts every self-attention of a whole UNet call, and injects if there are references."""

    def __init__(self, own: LoRADeltas, references: Any) -> None:
        super().__init__((), {}, own=own)
        self._references = references

    def _attend(self, site: Site) -> Tensor:
        return inject(site, [] if self._references is None else [self._references[site.key]])


def lora_on_both(task: TrainingTask, **changes: Any) -> TrainedModel:
    """A second LoRA on the UNet's self-attention, merged into its weights for sampling."""
    config = task.config(**changes)
    with training_setup(task.models, task.training_subject(), config, denoiser_class=AdaptedUnet) as setup:
        own = whole_lora_for(setup)
        setup.denoiser.own = own  # type: ignore[attr-defined]
        both = _Both(setup.lora, own)
        setup.train(both)
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
