"""One training run on a ComfyUI model: prepare it, train, and hand the model back as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as model_management
import torch
from torch import Tensor, nn

from ....core.adapter import Adapter, AdapterInfo
from ....core.adapter_file import FILE_DTYPE
from ....core.image_prompt import TextConditioning
from ....core.lora import SelfAttentionLoRA
from ....trainer.captions import captions_for
from ....trainer.config import TrainConfig
from ....trainer.loop import DivergedError, Step, Training
from ..adapter_index import warn_of_adapters_with
from ..networks.unet import UnetDescription, compute_dtype, describe, prediction_type
from ..text import check_placeholder_token, clip_with_token, finder, initial_token_embedding
from .autograd import (
    checkpoint_activations,
    clone_for_autograd,
    make_differentiable,
    memory_efficient_layers,
    out_of_place_text_encoder,
    recompute_cheap_ops,
    training_mode,
)
from .checkpoint import TrainingCheckpoint
from .denoiser import ComfyDenoiser
from .fingerprint import training_fingerprint
from .plain_weights import plain_weights
from .training_set import Subject, training_set, without_inference_tensors

log = logging.getLogger(__name__)

PRECISIONS: dict[str, torch.dtype | None] = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def train_adapter(
    model: Any,
    clip: Any,
    vae: Any,
    subject: Subject,
    config: TrainConfig,
    precision: str,
    checkpointing: bool,
    name: str,
    folder: Path,
    on_step: Callable[[Step], None],
) -> tuple[Adapter, list[float]]:
    """Train an adapter and return it with its loss history; `on_step` may raise to stop.

    The values are rounded to what the file will hold, so that the adapter draws the same before and after a reload.
    What was learned is kept in `folder`, however the run ends; the next one over the same things goes on from there.
    Weights of the model, the text encoder and the VAE keep every bit; patches are gone however this ends.
    """
    description = describe(model)
    check_placeholder_token(clip, subject.placeholder_token)
    captions = captions_for(
        subject.captions,
        len(subject.pictures),
        subject.placeholder_token,
        subject.class_word,
        finder(clip, subject.placeholder_token),
    )
    initial = initial_token_embedding(clip, subject.class_word, config.token_vectors)
    data = training_set(model, vae, subject, captions, config.seed)
    patcher = _training_clone(model, PRECISIONS[precision])
    try:
        with training_mode(), contextlib.ExitStack() as undo:
            model_management.load_models_gpu(
                [patcher, clip.patcher], memory_required=1e20, force_full_load=True
            )  # more than any device has: whatever else is loaded makes room
            base = patcher.model
            undo.enter_context(plain_weights(patcher, clip.patcher))
            make_differentiable(base)
            make_differentiable(clip.cond_stage_model)
            undo.enter_context(memory_efficient_layers(base.diffusion_model, clip.cond_stage_model))
            save_activation_memory = checkpoint_activations if checkpointing else recompute_cheap_ops
            undo.enter_context(save_activation_memory(base.diffusion_model))

            dtype = compute_dtype(base)
            # Not float16, which cannot hold what some text encoders compute.
            text_dtype = dtype if dtype == torch.bfloat16 else torch.float32
            undo.enter_context(out_of_place_text_encoder(clip, checkpointing, text_dtype))
            config = dataclasses.replace(config, loss_scaling=dtype == torch.float16)
            lora, tokens, patched_clip = _create_trainables(
                clip, description, initial, subject.placeholder_token, config, patcher
            )
            denoiser = ComfyDenoiser(
                base,
                patcher.get_model_object("model_sampling"),
                patched_clip,
                description.layers,
                patcher.load_device,
                dtype,
            )
            training = Training(
                denoiser,
                without_inference_tensors(data),
                lora,
                list(tokens.values()),
                subject.class_word,
                config,
                device=patcher.load_device,
                compute_dtype=dtype,
            )
            names = {"placeholder": subject.placeholder_token, "class_word": subject.class_word}
            same = training_fingerprint(patcher, patched_clip, data, subject.class_word, config, dtype, names)
            warn_of_adapters_with(subject.placeholder_token, same)
            checkpoint = TrainingCheckpoint(folder, same)
            _run_steps(training, config.steps, checkpoint, on_step)
            adapter = _build_adapter(
                name, description, subject, config, lora, tokens, training.reference_text, patcher, fingerprint=same
            )
    finally:
        if PRECISIONS[precision] is not None:
            # After a full load unpatching would leave the forced casts on, and the next partial load would take those
            # layers for offloaded ones and skip the user's LoRA on them.
            patcher.model.model_lowvram = True
            patcher.unpatch_model(patcher.offload_device)
        model_management.soft_empty_cache()
    if training.overflows:
        log.info("%d batches overflowed in float16 and were left out.", training.overflows)
    losses = training.losses
    log.info("Trained adapter '%s': %d steps, final loss %.4f.", name, len(losses), losses[-1])
    return adapter, losses


def _run_steps(training: Training, steps: int, checkpoint: TrainingCheckpoint, on_step: Callable[[Step], None]) -> None:
    """All that are left. However they end, what they have learned is kept, unless it leads nowhere."""
    checkpoint.resume(training, steps)
    try:
        for step in training:
            checkpoint.on_step(training)
            on_step(step)
    except DivergedError:
        checkpoint.discard_stopped()
        raise
    except BaseException:
        checkpoint.save(training)
        raise
    checkpoint.save(training, is_finished=True)
    training.apply_average()


def _training_clone(model: Any, dtype: torch.dtype | None) -> Any:
    """A patcher over the same weights whose compute precision may be set without touching the user's."""
    patcher = model.clone()
    if dtype is not None:
        patcher.set_model_compute_dtype(dtype)
    return patcher


def _create_trainables(
    clip: Any,
    description: UnetDescription,
    initial: dict[str, Tensor],
    placeholder_token: str,
    config: TrainConfig,
    patcher: Any,
) -> tuple[SelfAttentionLoRA, dict[str, nn.Parameter], Any]:
    """The LoRA, the token embeddings, and a CLIP that reads the placeholder as them."""
    generator = torch.Generator().manual_seed(config.seed)
    lora = SelfAttentionLoRA(description.layers, config.rank, config.alpha, generator).to(patcher.load_device)
    tokens = {
        name: nn.Parameter(clone_for_autograd(vector).to(clip.patcher.load_device)) for name, vector in initial.items()
    }
    return lora, tokens, clip_with_token(clip, placeholder_token, tokens)


def _build_adapter(
    name: str,
    description: UnetDescription,
    subject: Subject,
    config: TrainConfig,
    lora: SelfAttentionLoRA,
    tokens: dict[str, nn.Parameter],
    text: TextConditioning,
    patcher: Any,
    fingerprint: str,
) -> Adapter:
    def rounded(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", FILE_DTYPE).float()

    lora.to(torch.device("cpu"))
    lora.load_state_dict({key: rounded(tensor) for key, tensor in lora.state_dict().items()})
    for parameter in lora.parameters():
        parameter.requires_grad_(False)
    settings = dataclasses.asdict(config)
    return Adapter(
        name=name,
        info=AdapterInfo(
            architecture=description.architecture,
            layers=description.layers,
            rank=config.rank,
            alpha=config.alpha,
            reference_mode=config.reference_mode,
            placeholder_token=subject.placeholder_token,
            class_word=subject.class_word,
            training={
                **settings,
                "resolution": subject.resolution,
                "pictures": len(subject.pictures),
                "prediction_type": prediction_type(patcher),
                "fingerprint": fingerprint,
            },
        ),
        lora=lora,
        token_embedding={encoder: rounded(vector) for encoder, vector in tokens.items()},
        class_conditioning=TextConditioning(
            rounded(text.cross_attn), None if text.pooled is None else rounded(text.pooled)
        ),
    )
