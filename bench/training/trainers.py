"""Ways to train on the same pictures with the same model: ours, the host's LoRA, and all weights of the UNet.

Import only after the host has started.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import torch
from comfy.utils import ProgressBar
from torch.nn import functional as F

from sa_inject.core.image_prompt import TextConditioning
from sa_inject.nodes.host.files import adapter_folder
from sa_inject.nodes.host.learning.autograd import (
    checkpoint_activations,
    clone_for_autograd,
    differentiable_options,
    make_differentiable,
    training_mode,
)
from sa_inject.nodes.host.learning.checkpoint import FOLDER as TRAINING_STATES
from sa_inject.nodes.host.networks.unet import network_inputs
from tests.host import full_size

from ..measure import StepClock
from ..scenes import RANK, Scene

PICTURES = 4
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
CAPTION = "a photo of a toy"


@dataclass(frozen=True)
class Task:
    """The same task for all three: batch 1, the same pictures, one resolution, one precision of the computation."""

    host: Any
    scene: Scene
    clip: Any
    vae: Any
    dtype: str
    checkpointing: bool
    seed: int = 0  # another one for every round: a tenth of our steps have no reference, and are shorter

    @property
    def pictures(self) -> torch.Tensor:
        return full_size.random_pictures(PICTURES, self.scene.side)

    def latents(self) -> dict[str, torch.Tensor]:
        return self.host.execute("VAEEncode", pixels=self.pictures, vae=self.vae)[0]

    def conditioning(self) -> list:
        return self.host.execute("CLIPTextEncode", clip=self.clip, text=CAPTION)[0]


def train_ours(task: Task, steps: int, **changes: Any) -> list[float]:
    """TrainSAInjectAdapter: LoRA on the reference pass and the token embedding, trained in float32."""
    # Otherwise the node would find that the training is done, with or without checkpointing, and take no step.
    shutil.rmtree(adapter_folder() / TRAINING_STATES, ignore_errors=True)
    with StepClock() as clock:
        task.host.execute(
            "TrainSAInjectAdapter",
            model=task.scene.model,
            clip=task.clip,
            vae=task.vae,
            images=task.pictures,
            resolution=task.scene.side,
            steps=steps,
            batch_size=1,
            rank=RANK,
            precision=PRECISIONS[task.dtype],
            gradient_checkpointing=task.checkpointing,
            seed=task.seed,
            previews=0,
            sample_every=0,
            file_name="bench",
            **changes,
        )
    return clock.steps()


def train_ours_without_word(task: Task, steps: int) -> list[float]:
    """The same with a frozen token embedding, so that text is encoded only once, as in the other two."""
    return train_ours(task, steps, token_learning_rate=0.0)


def train_host_lora(task: Task, steps: int) -> list[float]:
    """TrainLoraNode with its defaults: LoRA on every layer, trained in the precision of the computation."""
    latents, positive = task.latents(), task.conditioning()
    with StepClock() as clock:
        task.host.execute(
            "TrainLoraNode",
            model=task.scene.model,
            latents=[{"samples": latent[None]} for latent in latents["samples"]],  # 0.3.75 fails on a single batch
            positive=[positive],
            steps=steps,
            batch_size=1,
            rank=RANK,
            training_dtype=PRECISIONS[task.dtype],
            lora_dtype=PRECISIONS[task.dtype],
            gradient_checkpointing=task.checkpointing,
            seed=task.seed,
        )
    return clock.steps()


def train_all_weights(task: Task, steps: int) -> list[float]:
    """A full fine-tune with AdamW: float32 weights as in ours, computed in the task's precision, with frozen text
    encoder.

    The learning rate is 0. The cost is the same, and the model does not change for the next trainer.
    """
    latents, (cross_attn, more) = task.latents()["samples"], task.conditioning()[0]
    patcher = task.scene.model.clone()
    with StepClock() as clock, training_mode(), contextlib.ExitStack() as undo:
        management.load_models_gpu([patcher], memory_required=1e20, force_full_load=True)
        base, device = patcher.model, patcher.load_device
        unet, stored = base.diffusion_model, base.get_dtype()
        make_differentiable(base)
        undo.callback(_restore, unet, stored)
        unet.float().requires_grad_(True)
        if task.checkpointing:
            undo.enter_context(checkpoint_activations(unet))
        optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0)
        generator = torch.Generator().manual_seed(task.seed)
        latents = base.process_latent_in(clone_for_autograd(latents)).to(device, torch.float32)
        pooled = more.get("pooled_output")
        text = TextConditioning(
            clone_for_autograd(cross_attn).to(device), None if pooled is None else clone_for_autograd(pooled).to(device)
        )
        progress = ProgressBar(steps)
        for step in range(steps):
            latent = latents[step % PICTURES][None]
            index = torch.randint(len(base.model_sampling.sigmas), (1,), generator=generator)
            sigma = base.model_sampling.sigmas.cpu()[index].to(device)
            noise = torch.randn(latent.shape, generator=generator).to(latent)
            noisy = base.model_sampling.noise_scaling(sigma.view(-1, 1, 1, 1), noise.clone(), latent)
            inputs = network_inputs(base, noisy, sigma, text, torch.float32)
            with torch.autocast(device.type, getattr(torch, task.dtype), enabled=task.dtype != "float32"):
                predicted = unet(*inputs, None, differentiable_options())
            loss = F.mse_loss(predicted.float(), noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            progress.update(1)
    return clock.steps()


def _restore(unet: torch.nn.Module, dtype: torch.dtype) -> None:
    unet.requires_grad_(False)
    for parameter in unet.parameters():
        parameter.grad = None
    unet.to(dtype)


TRAINERS: dict[str, Callable[[Task, int], list[float]]] = {
    "ours": train_ours,
    "ours, word kept": train_ours_without_word,
    "TrainLoraNode": train_host_lora,
    "full fine-tune": train_all_weights,
}
