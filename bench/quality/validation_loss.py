"""The denoising loss on real scenes of the prompts, which no method has seen.

The noise is the same for every method, so the loss varies much less than a score of pictures. It measures the model,
and not the errors that a sampler accumulates.

Import only after the host has started.
"""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from demo.base.scenes import render

from .drawing import unprompted
from .task import TrainedModel, TrainingTask, as_pixels

LEVELS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)  # indices in the model's schedule of 1000
SEED = 5


def unseen_loss(task: TrainingTask, trained: TrainedModel) -> list[float]:
    """Mean squared error of the predicted noise at each of LEVELS, over the scenes of the subject's prompts."""
    host, models, subject = task.host, task.models, task.subject
    scenes = as_pixels([render(scene) for scene in subject.prompts])
    latents = host.execute("VAEEncode", pixels=scenes, vae=models.vae)[0]["samples"]
    texts = subject.prompt_texts(trained.words)
    positive = [host.execute("CLIPTextEncode", clip=trained.clip, text=text)[0][0][0] for text in texts]
    lengths = [text.shape[1] for text in positive]
    # Texts of one length form a batch. A UNet's are all of one.
    groups = [[row for row, n in enumerate(lengths) if n == length] for length in dict.fromkeys(lengths)]
    found = [_loss_of(task, trained, latents[rows], [positive[row] for row in rows]) for rows in groups]
    if len(groups) == 1:
        return found[0]
    shares = [len(rows) / len(texts) for rows in groups]
    return [
        sum(share * losses[level] for share, losses in zip(shares, found, strict=True)) for level in range(len(LEVELS))
    ]


def _loss_of(task: TrainingTask, trained: TrainedModel, latents: Tensor, positive: list[Tensor]) -> list[float]:
    """The same for scenes whose texts are of one length."""
    losses: list[float] = []

    def measure(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """A sampler that draws nothing."""
        base = task.models.model.model
        clean = base.process_latent_in(latents).to(x)
        generator = torch.Generator().manual_seed(SEED)
        for level in LEVELS:
            sigma = base.model_sampling.sigmas[level].to(x)
            noise = torch.randn(x.shape, generator=generator).to(x)
            noisy = base.model_sampling.noise_scaling(sigma, noise.clone(), clean)
            denoised = model(noisy, sigma.expand(len(x)), **extra_args)
            losses.append(float(((denoised - clean) / sigma).square().mean()))
        return x

    nothing = torch.zeros_like(latents)
    with torch.inference_mode():
        comfy.sample.sample_custom(
            trained.model,
            nothing,
            1.0,  # without guidance, as in training
            comfy.samplers.KSAMPLER(measure),
            torch.tensor([1.0, 0.0]),
            [[torch.cat(positive), {}]],
            unprompted(task),
            nothing,
            seed=SEED,
            disable_pbar=True,
        )
    return losses
