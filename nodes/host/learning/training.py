"""One training of an adapter on a ComfyUI model: prepare it, run it, and build the adapter."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
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
from ....trainer.optimizers import check_optimizer
from ..adapter_index import warn_of_adapters_with
from ..embeddings import embedding_from_file
from ..networks.registry import describe, is_transformer, positions, warn_if_experimental
from ..networks.unet import compute_dtype, prediction_type
from ..text import check_placeholder_token, clip_with_token, encode_text, finder, initial_token_embedding
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
from .transformer_blocks import transformer_gradients

log = logging.getLogger(__name__)

PRECISIONS: dict[str, torch.dtype | None] = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


class AdapterTraining:
    """A subject that a model is to learn. Creating it reads the pictures; `run` and `build` belong inside `prepare`.

    Weights of the model, the text encoder and the VAE keep every bit; patches are gone however this ends.
    """

    # What is learned, and what it is learned with: from `prepare` on.
    lora: SelfAttentionLoRA
    tokens: dict[str, nn.Parameter]
    denoiser: ComfyDenoiser
    dtype: torch.dtype  # of the computation
    # From `run` on.
    reference_text: TextConditioning  # what the reference pass reads, the same from the first step to the last
    fingerprint: str = ""  # of what the steps are given

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        subject: Subject,
        config: TrainConfig,
        *,
        precision: str = "auto",
        checkpointing: bool = False,
        denoiser_class: Callable[..., ComfyDenoiser] = ComfyDenoiser,
    ) -> None:
        self.description = describe(model)
        warn_if_experimental(self.description.architecture)
        check_placeholder_token(clip, subject.placeholder_token)
        captions = captions_for(
            subject.captions,
            len(subject.pictures),
            subject.placeholder_token,
            subject.class_word,
            finder(clip, subject.placeholder_token),
        )
        check_optimizer(config.options.optimizer)
        self._initial = initial_token_embedding(clip, subject.class_word, config.token_vectors)
        if subject.initial_embedding:
            self._initial = embedding_from_file(clip, subject.initial_embedding)
            config = dataclasses.replace(config, token_vectors=len(next(iter(self._initial.values()))))
        self.data = training_set(model, vae, subject, captions, config.seed, config.options)
        self.patcher = model.clone()  # over the same weights; another compute precision does not reach the user's
        self._forced_dtype = PRECISIONS[precision]
        if self._forced_dtype is not None:
            self.patcher.set_model_compute_dtype(self._forced_dtype)
        self.clip, self.subject, self.config = clip, subject, config
        self.checkpointing = checkpointing
        self._denoiser_class = denoiser_class

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @contextlib.contextmanager
    def prepare(self) -> Iterator[None]:
        """Load the models, let gradients through them, and create what is learned."""
        try:
            with training_mode(), contextlib.ExitStack() as undo:
                self._known_texts = self._texts_in_advance()
                models = [self.patcher, *([] if self._known_texts else [self.clip.patcher])]
                load_fully(models)
                self.dtype = self._let_gradients_through(undo)
                self.config = dataclasses.replace(self.config, loss_scaling=self.dtype == torch.float16)
                self._create_trainables()
                yield
        finally:
            if self._forced_dtype is not None:
                # After a full load unpatching would leave the forced casts on, and the next partial load would take
                # those layers for offloaded ones and skip the user's LoRA on them.
                self.patcher.model.model_lowvram = True
                self.patcher.unpatch_model(self.patcher.offload_device)
            model_management.soft_empty_cache()

    def run(self, folder: Path, on_step: Callable[[Step], None]) -> list[float]:
        """Take the steps that are left, and return the losses of all; `on_step` may raise to stop.

        What was learned is kept in `folder`, however this ends; the next run over the same things goes on from there.
        """
        training = self.loop()
        self.reference_text = training.reference_text
        self.fingerprint = self._fingerprint()
        warn_of_adapters_with(self.subject.placeholder_token, self.fingerprint)
        checkpoint = TrainingCheckpoint(folder, self.fingerprint)
        _run_steps(training, self.config.steps, checkpoint, on_step)
        if training.overflows:
            log.info("%d batches overflowed in float16 and were left out.", training.overflows)
        return training.losses

    def loop(self, trainables: Any = None, **changes: Any) -> Training:
        """The steps, not taken yet. trainables: in the place of the LoRA; changes: settings that are others."""
        return Training(
            self.denoiser,
            self.data,
            trainables or self.lora,
            list(self.tokens.values()),
            self.subject.class_word,
            dataclasses.replace(self.config, **changes),
            device=self.device,
            compute_dtype=self.dtype,
        )

    def build(self, name: str) -> Adapter:
        """The adapter as it is now. Its values are rounded to what a file holds, so that it draws as it will then."""
        lora = copy.deepcopy(self.lora).to(torch.device("cpu"))
        lora.load_state_dict({key: _rounded(tensor) for key, tensor in lora.state_dict().items()})
        for parameter in lora.parameters():
            parameter.requires_grad_(False)
        text = self.reference_text
        return Adapter(
            name=name,
            info=self._info(),
            lora=lora,
            token_embedding={encoder: _rounded(vector) for encoder, vector in self.tokens.items()},
            class_conditioning=TextConditioning(
                _rounded(text.cross_attn), None if text.pooled is None else _rounded(text.pooled)
            ),
        )

    def _let_gradients_through(self, undo: contextlib.ExitStack) -> torch.dtype:
        """Change both loaded models for the training. -> what the network computes in"""
        base, encoder = self.patcher.model, self.clip.cond_stage_model
        network = base.diffusion_model
        undo.enter_context(plain_weights(self.patcher, *([] if self._known_texts else [self.clip.patcher])))
        make_differentiable(base)
        make_differentiable(encoder)
        undo.enter_context(memory_efficient_layers(network, encoder))
        if is_transformer(network):
            undo.enter_context(transformer_gradients(network, self.checkpointing))
        else:
            save_activation_memory = checkpoint_activations if self.checkpointing else recompute_cheap_ops
            undo.enter_context(save_activation_memory(network))
        dtype = compute_dtype(base)
        # Not float16, which cannot hold what some text encoders compute.
        text_dtype = dtype if dtype == torch.bfloat16 else torch.float32
        undo.enter_context(out_of_place_text_encoder(self.clip, self.checkpointing, text_dtype))
        return dtype

    def _create_trainables(self) -> None:
        """The LoRA, the token embeddings, a CLIP that reads the placeholder as them, and a denoiser with that."""
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        self.data = without_inference_tensors(self.data)
        self.lora = SelfAttentionLoRA(self.description.layers, config.rank, config.alpha, generator).to(self.device)
        text_device = self.clip.patcher.load_device
        self.tokens = {
            name: nn.Parameter(clone_for_autograd(vector).to(text_device)) for name, vector in self._initial.items()
        }
        self._patched_clip = clip_with_token(self.clip, self.subject.placeholder_token, self.tokens)
        self.denoiser = self._denoiser_class(
            self.patcher.model,
            self.patcher.get_model_object("model_sampling"),
            self._patched_clip,
            self.description.layers,
            self.device,
            self.dtype,
            positions=positions(self.description.architecture),
            known_texts=self._known_texts,
        )

    def _texts_in_advance(self) -> dict[str, TextConditioning]:
        """Every caption as the text encoder reads it, where the word does not learn and the encoder is a large one.

        It leaves the device then: the model that is loaded next takes all room there is.
        """
        if self.config.token_learning_rate > 0 or not is_transformer(self.patcher.model.diffusion_model):
            return {}
        load_fully([self.clip.patcher])
        clip = clip_with_token(self.clip, self.subject.placeholder_token, self._initial)
        captions = {caption for e in (*self.data.examples, *self.data.views) for caption in e.captions}
        with torch.no_grad():
            return {caption: encode_text(clip, [caption]) for caption in sorted({*captions, self.subject.class_word})}

    def _fingerprint(self) -> str:
        word = self.subject.class_word
        names = {"placeholder": self.subject.placeholder_token, "class_word": word}
        return training_fingerprint(self.patcher, self._patched_clip, self.data, word, self.config, self.dtype, names)

    def _info(self) -> AdapterInfo:
        config, subject = self.config, self.subject
        return AdapterInfo(
            architecture=self.description.architecture,
            layers=self.description.layers,
            rank=config.rank,
            alpha=config.alpha,
            reference_mode=config.reference_mode,
            placeholder_token=subject.placeholder_token,
            class_word=subject.class_word,
            training={
                **dataclasses.asdict(config),
                "resolution": subject.resolution,
                "pictures": len(subject.pictures),
                "prediction_type": prediction_type(self.patcher),
                "fingerprint": self.fingerprint,
            },
            positions=positions(self.description.architecture),
        )


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


def load_fully(patchers: list[Any]) -> None:
    """Load models and keep nothing else: they are given more room than any device has."""
    model_management.load_models_gpu(patchers, memory_required=1e20, force_full_load=True)


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", FILE_DTYPE).float()
