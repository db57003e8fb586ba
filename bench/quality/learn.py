"""The pack's own training loop with other trainables: what every fine-tune of the quality bench has in common.

Pictures, captions, word, pairs, noise, objective and optimizer are the pack's. A method only says what it trains,
and what becomes of it. Import only once the host is started.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import comfy.model_management as management
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_inject.core.adapter import Adapter
from sa_inject.core.lora import SelfAttentionLoRA
from sa_inject.nodes.host.learning import training, training_set
from sa_inject.nodes.host.learning.autograd import (
    clone_for_autograd,
    make_differentiable,
    out_of_place_text_encoder,
    patched_forward,
    training_mode,
)
from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser
from sa_inject.nodes.host.networks.unet import UnetDescription, describe
from sa_inject.nodes.host.text import clip_with_token, finder, initial_token_embedding
from sa_inject.trainer.captions import captions_for
from sa_inject.trainer.config import TrainConfig
from sa_inject.trainer.examples import Example, TrainingSet
from sa_inject.trainer.loop import Training


@dataclass(frozen=True)
class Models:
    """The loaded base model, in float32; `drawing` computes in the precision of the run."""

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
    """Anything but our LoRA, in the form that the loop expects: without a reference it never asks for deltas."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def deltas(self, *_: Any) -> dict:
        return {}


@dataclass
class TrainingSetup:
    """A model that gradients flow through, and all that a training run on it needs. `lora` is fresh."""

    unet: nn.Module
    description: UnetDescription
    denoiser: ComfyDenoiser
    data: TrainingSet
    subject: training_set.Subject
    lora: SelfAttentionLoRA
    tokens: dict[str, nn.Parameter]
    config: TrainConfig
    dtype: torch.dtype
    patcher: Any
    device: torch.device

    def learn(self, trainables: Any, **changes: Any) -> list[float]:
        """Run the loop; the loss of every step."""
        tokens = list(self.tokens.values())
        read = self.subject.class_word
        config = replace(self.config, **changes)
        # Without its cache, which would keep the weights of the first step for as long as the context lasts.
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, cache_enabled=False):
            training = Training(self.denoiser, self.data, trainables, tokens, read, config, device=self.device)
            losses = [step.loss for step in training]
        training.apply_average()
        return losses

    def adapter(self) -> Adapter:
        """What the pack would save."""
        with torch.no_grad():
            text = self.denoiser.encode([self.subject.class_word])
        return training._build_adapter(
            "bench", self.description, self.subject, self.config, self.lora, self.tokens, text, self.patcher
        )

    def learned_word(self) -> dict[str, Tensor]:
        return {name: vector.detach().cpu() for name, vector in self.tokens.items()}


@contextlib.contextmanager
def training_setup(
    models: Models,
    subject: training_set.Subject,
    config: TrainConfig,
    extra: Sequence[Example] = (),
    denoiser_class: Callable[..., ComfyDenoiser] = ComfyDenoiser,
) -> Iterator[TrainingSetup]:
    """Prepare everything as TrainSAInjectAdapter does; the UNet's weights are back in place when this ends.

    extra: examples that are learned as often as the subject's own, for prior preservation.
    """
    with torch.inference_mode():  # as in a node
        description = describe(models.model)
        captions = captions_for(
            subject.captions,
            len(subject.pictures),
            subject.placeholder_token,
            subject.class_word,
            finder(models.clip, subject.placeholder_token),
        )
        initial = initial_token_embedding(models.clip, subject.class_word, config.token_vectors)
        data = training_set.training_set(models.model, models.vae, subject, captions, config.seed)
    patcher = models.model.clone()
    with training_mode(), contextlib.ExitStack() as undo:
        management.load_models_gpu([patcher, models.clip.patcher], memory_required=1e20, force_full_load=True)
        base = patcher.model
        make_differentiable(base)
        make_differentiable(models.clip.cond_stage_model)
        undo.enter_context(out_of_place_text_encoder(models.clip, checkpointing=False))
        undo.enter_context(cast_once(models.clip.cond_stage_model, models.dtype))
        undo.enter_context(weights_kept(base.diffusion_model))
        lora, tokens, patched_clip = training._create_trainables(
            models.clip, description, initial, subject.placeholder_token, config, patcher
        )
        sampling = patcher.get_model_object("model_sampling")
        device = patcher.load_device
        yield TrainingSetup(
            unet=base.diffusion_model,
            description=description,
            denoiser=denoiser_class(base, sampling, patched_clip, description.layers, device, torch.float32),
            data=mixed(training_set.without_inference_tensors(data), extra),
            subject=subject,
            lora=lora,
            tokens=tokens,
            config=config,
            dtype=models.dtype,
            patcher=patcher,
            device=device,
        )


def mixed(data: TrainingSet, extra: Sequence[Example]) -> TrainingSet:
    """The subject's examples, repeated until they are as many as the others."""
    if not extra:
        return data
    own = list(data.examples)
    return TrainingSet([*(own[i % len(own)] for i in range(len(extra))), *extra], data.views)


def cast_once(frozen: nn.Module, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Under autocast, linear layers find their weights cast already; what they compute is the same, bit by bit.

    On a CPU, casting a text encoder of five times the UNet's size takes a seventh of every step.
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
    """In bfloat16 on a CPU, attention that gradients flow through is computed as two products and a softmax.

    Torch's own kernel takes several times as long backwards there: two fifths of a training. What comes out differs by
    rounding.
    """
    kernel = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        # Neither dropout nor a causal mask nor a scale of one's own is written out here: the kernel has them.
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
    """Whatever is done to the weights inside is undone, bit by bit."""
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
    """The drawing model with weights that differ by so much, as a ModelPatcher patch. {UNet parameter: difference}"""
    patched = models.drawing
    patched.add_patches({f"diffusion_model.{name}": ("diff", (value,)) for name, value in differences.items()})
    return patched
