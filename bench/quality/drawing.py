"""How the quality bench draws with a trained model: by the host's sampler.

Import only after the host has started.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.sample
import torch
from PIL import Image
from torch import Tensor

from demo.base.scenes import IMAGE_SIZE
from sa_inject.nodes.host.networks.registry import is_transformer

from .task import TrainedModel, TrainingTask, as_pixels

PROMPTS_OF_CALL = 13  # in one call on CUDA, where single ones would wait for kernel launches


def sample(
    task: TrainingTask,
    trained: TrainedModel,
    texts: Sequence[str],
    pictures: int,
    seeds: Sequence[int],
    of_call: int | None = None,
) -> Tensor:
    """Latents of several pictures of every prompt, by the host's sampler. The noise of each prompt has its own seed.

    of_call: prompts that are drawn in one call. -> (prompts*pictures, c, h, w)
    """
    if is_transformer(task.models.model.model.diffusion_model):
        of_call = 1  # its texts differ in length
    of_call = of_call or (PROMPTS_OF_CALL if torch.cuda.is_available() else 1)
    return torch.cat(
        [
            _sample_at_once(task, trained, texts[first : first + of_call], pictures, seeds[first : first + of_call])
            for first in range(0, len(texts), of_call)
        ]
    )


def _sample_at_once(
    task: TrainingTask, trained: TrainedModel, texts: Sequence[str], pictures: int, seeds: Sequence[int]
) -> Tensor:
    """As KSampler does it, but KSampler's noise has one seed for all."""
    host, settings = task.host, task.settings
    found = [host.execute("CLIPTextEncode", clip=trained.clip, text=text)[0][0] for text in texts]
    cross_attn = torch.cat([text[0] for text in found]).repeat_interleave(pictures, dim=0)
    empty = host.execute("EmptyLatentImage", width=IMAGE_SIZE, height=IMAGE_SIZE, batch_size=pictures)[0]["samples"]
    with torch.inference_mode():
        return comfy.sample.sample(
            trained.model,
            torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds]),
            settings.sampler_steps,
            settings.cfg,
            settings.sampler,
            settings.scheduler,
            [[cross_attn, {}]],
            unprompted(task),
            empty.repeat(len(texts), 1, 1, 1),
            denoise=1.0,
            seed=seeds[0],
            disable_pbar=True,
        )


def unprompted(task: TrainingTask) -> Any:
    """Conditioning of the empty prompt, which contains no trained token. Encoded once per task."""
    if task.negative is None:
        task.negative = task.host.execute("CLIPTextEncode", clip=task.models.clip, text="")[0]
    return task.negative


def draw(task: TrainingTask, trained: TrainedModel, texts: Sequence[str], pictures: int) -> list[Image.Image]:
    """Several pictures of every prompt, in the order of the prompts. Seeds depend on the prompt's index only."""
    seeds = [1000 * index for index in range(len(texts))]
    return decoded(task.host, task.models.vae, {"samples": sample(task, trained, texts, pictures, seeds)})


def autoencoded(host: Any, vae: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures after the host's VAE has encoded and decoded them."""
    return decoded(host, vae, host.execute("VAEEncode", pixels=as_pixels(images), vae=vae)[0])


def decoded(host: Any, vae: Any, latent: dict[str, Any]) -> list[Image.Image]:
    pixels = host.execute("VAEDecode", samples=latent, vae=vae)[0]
    return [Image.fromarray(picture) for picture in (pixels.clamp(0, 1) * 255).round().byte().cpu().numpy()]
