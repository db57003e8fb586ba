"""The training loop: LoRA and token embedding together, from the first step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.image_prompt import ReferenceText
from ..core.lora import Deltas, SelfAttentionLoRA
from .config import TrainConfig
from .denoiser import Denoiser
from .examples import Example, Pair, TrainingSet, group_by_shape
from .objective import network_loss


class Step(NamedTuple):
    """What one optimizer step reports."""

    number: int  # counts from 1
    loss: float


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def train(
    denoiser: Denoiser,
    data: TrainingSet,
    lora: SelfAttentionLoRA,
    tokens: Sequence[nn.Parameter],
    reference_caption: str,
    config: TrainConfig,
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Train in place and yield after every optimizer step; stopping early leaves a usable adapter.

    `reference_caption` is what the reference pass reads: without the learned word, so that it is encoded only once.
    Raises Diverged at the first loss that is not finite.
    """
    with torch.no_grad():
        reference_text = denoiser.encode([reference_caption])
    generator = torch.Generator().manual_seed(config.seed)
    pairs = data.pairs(config.reference_dropout, generator)
    optimizer = torch.optim.AdamW(
        [
            {"params": lora.parameters(), "lr": config.lora_learning_rate, "weight_decay": config.weight_decay},
            {"params": list(tokens), "lr": config.token_learning_rate, "weight_decay": 0.0},
        ]
    )
    trainables = [*lora.parameters(), *tokens]
    sigmas = denoiser.sigmas.cpu()  # ascending
    scaler = torch.amp.GradScaler(device.type, enabled=config.loss_scaling)
    for number in range(1, config.steps + 1):
        total = 0.0
        for _ in range(config.accumulation):
            batch = list(itertools.islice(pairs, config.batch_size))
            levels = torch.randint(len(sigmas), (len(batch),), generator=generator)  # uniform, as the model's
            batch = _without_early_references(batch, levels, (1 - config.reference_start) * len(sigmas))
            for places in group_by_shape(batch):
                group, sigma = [batch[place] for place in places], sigmas[levels[places]].to(device)
                share = len(group) / len(batch) / config.accumulation
                deltas = lora.deltas(device, compute_dtype)
                loss = share * _group_loss(denoiser, group, sigma, deltas, reference_text, config, generator, device)
                scaler.scale(loss).backward()
                total += loss.item()
        if not torch.isfinite(torch.tensor(total)):
            raise Diverged(
                f"The loss became {total} at step {number}. Lower the learning rates, or choose a wider precision."
            )
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainables, config.max_gradient_norm)
        if not config.loss_scaling and not torch.isfinite(norm):
            raise Diverged(f"The gradient became {norm.item()} at step {number}. Lower the learning rates.")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield Step(number, total)


def _without_early_references(batch: Sequence[Pair], levels: Tensor, first: float) -> list[Pair]:
    """Let the word stand alone at noise levels from `first` on, which a sampler goes through first."""
    return [
        pair if level < first else pair._replace(reference=None)
        for pair, level in zip(batch, levels.tolist(), strict=True)
    ]


def _group_loss(
    denoiser: Denoiser,
    group: Sequence[Pair],
    sigma: Tensor,
    deltas: Deltas,
    reference_text: ReferenceText,
    config: TrainConfig,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Mean loss of pairs that have one shape, noised to sigma (b,). -> ()"""
    rows = len(group)
    targets = [pair.target for pair in group]
    captions = [pair.caption for pair in group]
    references = [pair.reference for pair in group if pair.reference is not None]
    latent = _stack(targets, device)  # (b, c, h, w)
    noisy = denoiser.add_noise(latent, _noise_like(latent, generator), sigma)

    bank = None
    if references:
        bank = denoiser.read_reference(
            *_reference_input(denoiser, references, sigma, config, generator, device),
            text=_repeat(reference_text, rows),
            mask=_stack_masks(references, device),
            deltas=deltas,
        )
    denoised = denoiser.denoise(noisy, sigma, denoiser.encode(captions), bank)
    mask = _stack_masks(targets, device)
    return network_loss(denoised, latent, denoiser.output_scale(sigma), None if mask is None else mask[:, None]).mean()


def _reference_input(
    denoiser: Denoiser,
    references: Sequence[Example],
    sigma: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    latent = _stack(references, device)
    if config.reference_mode == "clean":
        return latent, None
    # Noise of its own: shared noise would tell the model where the reference's details go.
    return denoiser.add_noise(latent, _noise_like(latent, generator), sigma), sigma


def _noise_like(latent: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(latent.shape, generator=generator).to(latent)


def _stack(examples: Sequence[Example], device: torch.device) -> Tensor:
    return torch.cat([example.latent for example in examples]).to(device, torch.float32)  # (b, c, h, w)


def _stack_masks(examples: Sequence[Example], device: torch.device) -> Tensor | None:
    """Masks where there are any, ones for the pictures without. -> (b, h, w) or None"""
    if all(example.mask is None for example in examples):
        return None
    masks = [torch.ones(example.latent.shape[-2:]) if example.mask is None else example.mask for example in examples]
    return torch.stack(masks).to(device, torch.float32)


def _repeat(text: ReferenceText, rows: int) -> ReferenceText:
    cross_attn, pooled = text
    return ReferenceText(
        cross_attn.expand(rows, *cross_attn.shape[1:]),
        None if pooled is None else pooled.expand(rows, *pooled.shape[1:]),
    )
