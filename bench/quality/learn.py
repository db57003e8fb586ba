"""The pack's training loop with other trainables: the common part of all fine-tuning methods of the quality bench.

Pictures, captions, token, pairs, noise, objective and optimizer are the pack's. A method chooses what is trained, and
what is built from it. Import only after the host has started.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_inject.core.adapter import Adapter
from sa_inject.nodes.host.learning.autograd import (
    clone_for_autograd,
    make_differentiable,
    out_of_place_text_encoder,
    patched_forward,
)
from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser
from sa_inject.nodes.host.learning.training import AdapterTraining
from sa_inject.nodes.host.learning.training_models import TrainingModels
from sa_inject.nodes.host.learning.training_set import Subject
from sa_inject.nodes.host.text import clip_with_token
from sa_inject.trainer.config import TrainConfig
from sa_inject.trainer.examples import Example, TrainingSet


@dataclass(frozen=True)
class Models:
    """The loaded base model, in float32. `drawing` computes in the precision of the run."""

    model: Any
    clip: Any
    vae: Any
    dtype: torch.dtype

    @property
    def drawing(self) -> Any:
        patcher = self.model.clone()
        if self.dtype != torch.float32:
            patcher.set_model_compute_dtype(self.dtype)
        return patcher


class Trainables:
    """Any trainables, in the form that the loop expects. Without references, it never asks for deltas."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def deltas(self, *_: Any) -> dict:
        return {}


class UnfrozenModels(TrainingModels):
    """Without the memory-efficient layers, which are for frozen weights. Here they may be trained."""

    def __init__(self, *models: Any, autocast: torch.dtype, **settings: Any) -> None:
        super().__init__(*models, **settings)
        self._autocast = autocast

    def make_models_differentiable(self, undo: contextlib.ExitStack) -> torch.dtype:
        make_differentiable(self.patcher.model)
        make_differentiable(self.clip.cond_stage_model)
        undo.enter_context(out_of_place_text_encoder(self.clip, checkpointing=False))
        undo.enter_context(cast_once(self.clip.cond_stage_model, self._autocast))
        undo.enter_context(weights_kept(self.patcher.model.diffusion_model))
        return torch.float32


class TrainingSetup(AdapterTraining):
    """The pack's training of one subject, with any trainables. `lora` is untrained."""

    def __init__(
        self,
        models: Models,
        subject: Subject,
        config: TrainConfig,
        denoiser_class: Callable[..., ComfyDenoiser] = ComfyDenoiser,
    ) -> None:
        self.autocast = models.dtype
        super().__init__(
            models.model,
            models.clip,
            models.vae,
            subject,
            config,
            denoiser_class=denoiser_class,
            models_class=partial(UnfrozenModels, autocast=models.dtype),
        )

    @property
    def unet(self) -> nn.Module:
        return self.models.patcher.model.diffusion_model

    def train(self, trainables: Any, **changes: Any) -> list[float]:
        """Run the loop. -> the loss of every step"""
        # Without autocast's cache, which would keep the weights of the first step inside the context.
        enabled = self.autocast != torch.float32
        with torch.autocast(self.device.type, self.autocast, enabled, cache_enabled=False):
            training = self.loop(trainables, **changes)
            losses = [step.loss for step in training]
        training.apply_average()
        return losses

    def adapter(self) -> Adapter:
        """The adapter that the pack would save."""
        with torch.no_grad():
            self.reference_text = self.denoiser.encode([self.subject.class_word])
        return self.build("bench")

    def learned_word(self) -> dict[str, Tensor]:
        return {name: vector.detach().cpu() for name, vector in self.tokens.items()}


@contextlib.contextmanager
def training_setup(
    models: Models,
    subject: Subject,
    config: TrainConfig,
    extra: Sequence[Example] = (),
    denoiser_class: Callable[..., ComfyDenoiser] = ComfyDenoiser,
) -> Iterator[TrainingSetup]:
    """Prepare everything as TrainSAInjectAdapter does. Afterwards the UNet has its old weights.

    extra: examples that are used as often as the subject's own, for prior preservation.
    """
    with torch.inference_mode():  # as in a node
        setup = TrainingSetup(models, subject, config, denoiser_class)
    with setup.prepare():
        setup.data = mixed(setup.data, extra)
        yield setup


def mixed(data: TrainingSet, extra: Sequence[Example]) -> TrainingSet:
    """The subject's examples, repeated until they are as many as the others."""
    if not extra:
        return data
    own = list(data.examples)
    return TrainingSet([*(own[i % len(own)] for i in range(len(extra))), *extra], data.views)


def cast_once(frozen: nn.Module, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Cast weights of linear layers once, for autocast. The results are the same bit for bit.

    On a CPU, casting a text encoder of five times the UNet's size takes a large part of every step.
    """
    layers = [layer for layer in frozen.modules() if isinstance(layer, nn.Linear) and dtype != torch.float32]
    cast = {
        layer: [None if p is None else p.detach().to(dtype) for p in (layer.weight, layer.bias)] for layer in layers
    }

    def forward(layer: nn.Linear, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return F.linear(x, *cast[layer]) if torch.is_autocast_enabled(x.device.type) else original(x)

    return patched_forward(layers, forward)


@contextlib.contextmanager
def attention_written_out() -> Iterator[None]:
    """On a CPU in bfloat16, compute attention with gradients as two products and a softmax.

    The backward pass of torch's own kernel takes several times as long there. Results differ by rounding.
    """
    kernel = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        # Dropout, causal masks and other scales are left to the kernel.
        is_plain = not any(args) and not any(kwargs.values())
        is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
        if not is_slow or not is_plain:
            return kernel(q, k, v, attn_mask, *args, **kwargs)
        logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return logits.softmax(dim=-1).to(v.dtype) @ v

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


@contextlib.contextmanager
def weights_kept(unet: nn.Module) -> Iterator[None]:
    """Restore all weights afterwards, bit for bit."""
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                parameter.requires_grad_(False).grad = None
                parameter.copy_(before[name])


def class_examples(models: Models, latents: Tensor, captions: Sequence[str]) -> list[Example]:
    """Pictures of the class as examples. latents (n, c, h, w) as a sampler returns them."""
    scaled = models.model.model.process_latent_in(latents).float().cpu()
    return [
        Example(clone_for_autograd(latent[None]), (caption,)) for latent, caption in zip(scaled, captions, strict=True)
    ]


def with_word(models: Models, word: dict[str, Tensor], placeholder_token: str) -> Any:
    return clip_with_token(models.clip, placeholder_token, word)


def with_differences(models: Models, differences: dict[str, Tensor]) -> Any:
    """The sampling model with changed weights, as a ModelPatcher patch. differences: {UNet parameter: difference}"""
    patched = models.drawing
    patched.add_patches({f"diffusion_model.{name}": ("diff", (value,)) for name, value in differences.items()})
    return patched
