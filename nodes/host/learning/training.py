"""One training of an adapter on a ComfyUI model: prepare, run, and build the adapter."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_management import get_free_memory as free_memory
from torch import Tensor, nn

from ....core.adapter import Adapter, AdapterInfo
from ....core.adapter_file import FILE_DTYPE
from ....core.image_prompt import TextConditioning
from ....core.lora import SelfAttentionLoRA
from ....trainer.captions import captions_for
from ....trainer.config import TrainConfig
from ....trainer.examples import TrainingSet
from ....trainer.loop import Training
from ....trainer.optimizers import check_optimizer
from ....trainer.validation import Validation, held_out_of
from ....trainer.watch import Watch
from ....trainer.weighting import check_flow_weighting
from ....trainer.workers import current_workers, follow, share_number, share_state
from ..adapter_index import warn_of_adapters_with
from ..embeddings import embedding_from_file
from ..networks.registry import describe, is_transformer, positions, warn_if_experimental
from ..networks.unet import prediction_type
from ..text import check_placeholder_token, clip_with_token, encode_text, finder, initial_token_embedding
from .autograd import clone_for_autograd, training_mode
from .checkpoint import TrainingCheckpoint
from .denoiser import ComfyDenoiser
from .fingerprint import digest_of, training_fingerprint
from .preflight import counts, preflight
from .step_memory import StepMemory, in_words, shortage, step_memory
from .steps import Steps
from .training_models import TrainingModels, load_fully
from .training_set import Subject, training_set, without_inference_tensors

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

log = logging.getLogger(__name__)


class AdapterTraining:
    """A training of one subject. Creating it encodes the pictures. Call `run` and `build` inside `prepare`.

    The weights of the model, the text encoder and the VAE are not changed. All patches are removed at the end, also
    after an exception.
    """

    # From `prepare` on: the trainables, and the denoiser.
    lora: SelfAttentionLoRA
    tokens: dict[str, nn.Parameter]
    denoiser: ComfyDenoiser
    # From `run` on.
    reference_text: TextConditioning  # of the reference pass, the same in all steps
    fingerprint: str = ""  # of all inputs of the steps

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        subject: Subject,
        config: TrainConfig,
        *,
        precision: str = "auto",
        checkpointing: bool = False,
        hold_out: bool = False,
        begin_with: Adapter | None = None,
        denoiser_class: Callable[..., ComfyDenoiser] = ComfyDenoiser,
        models_class: Callable[..., TrainingModels] = TrainingModels,
    ) -> None:
        """model, clip, vae: of one base model. precision: a key of PRECISIONS.

        checkpointing: gradient checkpointing, for less memory. hold_out: keep one picture for validation.
        begin_with: an adapter with the initial values. Its rank, alpha and number of token vectors replace those of
        `config`, but an initial embedding of the subject is used. Raises ValueError, with advice, for wrong inputs.
        """
        self.description = describe(model)
        warn_if_experimental(self.description.architecture)
        check_placeholder_token(clip, subject.placeholder_token)
        self._captions = captions_for(
            subject.captions,
            len(subject.pictures),
            subject.placeholder_token,
            subject.class_word,
            finder(clip, subject.placeholder_token),
        )
        check_optimizer(config.options.optimizer)
        check_flow_weighting(config.options, prediction_type(model), self.description.architecture)
        self._begin_with = begin_with
        if begin_with is not None:
            begin_with.check_fits(self.description.architecture, self.description.layers, prediction_type(model))
            config = dataclasses.replace(config, rank=begin_with.info.rank, alpha=begin_with.info.alpha)
        if subject.initial_embedding:  # also in the place of the adapter's
            self._initial = embedding_from_file(clip, subject.initial_embedding)
        elif begin_with is not None:
            self._initial = begin_with.token_embedding
        else:
            self._initial = initial_token_embedding(clip, subject.class_word, config.token_vectors)
        config = dataclasses.replace(config, token_vectors=len(next(iter(self._initial.values()))))
        self.data = training_set(model, vae, subject, self._captions, config.seed, config.options)
        self.data, self.held_out = held_out_of(self.data) if hold_out else (self.data, [])
        self.models = models_class(model, clip, precision=precision, checkpointing=checkpointing)
        self.subject, self.config = subject, config
        self._denoiser_class = denoiser_class
        self._known_texts: dict[str, TextConditioning] = {}

    @property
    def device(self) -> torch.device:
        return self.models.device

    @contextlib.contextmanager
    def prepare(self) -> Iterator[None]:
        """Load the models, make them differentiable, and create the trainables."""
        self._known_texts = self._texts_in_advance()
        self.models.needs_clip = not self._known_texts
        with self.models.loaded():
            self.config = dataclasses.replace(self.config, loss_scaling=self.models.dtype == torch.float16)
            self._create_trainables()
            yield

    def run(self, folder: Path, watch: Watch) -> list[float]:
        """Take the remaining steps. -> the losses of all steps

        A checkpoint is saved in `folder` at the end, also after an exception. A run with the same inputs resumes there.
        """
        training = self.loop()
        if current_workers().rank > 0:
            follow(training, current_workers())
        self.reference_text = training.reference_text
        self.fingerprint = self._fingerprint()
        warn_of_adapters_with(self.subject.placeholder_token, self.fingerprint)
        checkpoint = TrainingCheckpoint(folder, self.fingerprint, watch.settings.save_every)
        end = checkpoint.resume(training, self.config.steps)
        share_state(training, current_workers())
        share_number(end, current_workers())
        watch.begin(training, self.fingerprint)
        self._tell_before(watch)
        steps = Steps(
            training,
            checkpoint,
            Validation(self.data, self.held_out, self.config, self.denoiser.sigmas.cpu()),
            watch,
            released=self.models.released,
            build=lambda: self.build("", steps=len(training.losses)),
            save_memory=lambda: self._save_memory(training),
            device=self.device,
        )
        steps.take_all(end)
        self.config = dataclasses.replace(self.config, steps=len(training.losses))  # fewer after Finish now
        if training.overflows:
            log.info("%d batches overflowed in float16 and were left out.", training.overflows)
        return training.losses

    def _tell_before(self, watch: Watch) -> None:
        """Show the inputs, the memory of a step, and warnings, before the first step."""
        has_word = finder(self.models.clip, self.subject.placeholder_token)
        memory, free = self.step_memory(self.models.checkpointing), free_memory(self.device)
        watch.tell(
            [
                counts(self.data, self._captions, has_word, self.config.steps),
                in_words(memory, free, self.device),
            ]
        )
        checkpointed = None if self.models.checkpointing else self.step_memory(checkpointing=True)
        watch.warn([*preflight(self.subject, self._captions, has_word), *shortage(memory, checkpointed, free)])

    def step_memory(self, checkpointing: bool) -> StepMemory:
        """An estimate of what a step takes beside the loaded models. Inside `run`."""
        text_tokens = self.reference_text.cross_attn.shape[1]
        layers, examples = self.description.layers, self.data.examples
        return step_memory(self.models, layers, examples, text_tokens, self.config, checkpointing=checkpointing)

    def loop(self, trainables: SelfAttentionLoRA | None = None, **changes: Any) -> Training:
        """The training loop before its first step. trainables: in place of the LoRA. changes: of `config`."""
        return Training(
            self.denoiser,
            self.data,
            trainables or self.lora,
            list(self.tokens.values()),
            self.subject.class_word,
            dataclasses.replace(self.config, **changes),
            device=self.device,
            compute_dtype=self.models.dtype,
            workers=current_workers(),
        )

    def build(self, name: str, steps: int | None = None) -> Adapter:
        """The current adapter, after `steps` steps; None: all. Its values are rounded to the file's precision."""
        lora = copy.deepcopy(self.lora).to(torch.device("cpu"))
        lora.load_state_dict({key: _rounded(tensor) for key, tensor in lora.state_dict().items()})
        for parameter in lora.parameters():
            parameter.requires_grad_(False)
        text = self.reference_text
        return Adapter(
            name=name,
            info=self._info(self.config.steps if steps is None else steps),
            lora=lora,
            token_embedding={encoder: _rounded(vector) for encoder, vector in self.tokens.items()},
            class_conditioning=TextConditioning(
                _rounded(text.cross_attn), None if text.pooled is None else _rounded(text.pooled)
            ),
        )

    def _save_memory(self, training: Training) -> str | None:
        """Use less memory from the next step on. -> how, for the log; None if nothing is left to do"""
        if not self.models.checkpointing:
            self.models.checkpointing = True
            with self.models.released():
                pass
            return "with gradient checkpointing"
        rows = training.max_rows or self.config.batch_size
        if rows == 1:
            return None
        training.max_rows = rows // 2
        return f"with {training.max_rows} of {self.config.batch_size} pictures at a time (the same but for rounding)"

    def _create_trainables(self) -> None:
        """Create the LoRA, the token embeddings, a CLIP with the placeholder token, and the denoiser."""
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        self.data = without_inference_tensors(self.data)
        if self.held_out:
            self.held_out = list(without_inference_tensors(TrainingSet(self.held_out, self.held_out)).examples)
        self.lora = SelfAttentionLoRA(self.description.layers, config.rank, config.alpha, generator).to(self.device)
        if self._begin_with is not None:
            values = self._begin_with.lora.state_dict()
            self.lora.load_state_dict({key: clone_for_autograd(value) for key, value in values.items()})
        text_device = self.models.clip.patcher.load_device
        self.tokens = {
            name: nn.Parameter(clone_for_autograd(vector).to(text_device)) for name, vector in self._initial.items()
        }
        self._patched_clip = clip_with_token(self.models.clip, self.subject.placeholder_token, self.tokens)
        self.denoiser = self._denoiser_class(
            self.models.patcher.model,
            self.models.patcher.get_model_object("model_sampling"),
            self._patched_clip,
            self.description.layers,
            self.device,
            self.models.dtype,
            positions=positions(self.description.architecture),
            known_texts=self._known_texts,
        )

    def _texts_in_advance(self) -> dict[str, TextConditioning]:
        """Encode all captions before the model is loaded, if the token embedding is frozen. Only for transformers.

        Their text encoders are large. After this the encoder leaves the device, which is needed for the model.
        """
        if self.config.token_learning_rate > 0 or not is_transformer(self.models.patcher.model.diffusion_model):
            return {}
        captions = {caption for e in (*self.data.examples, *self.data.views, *self.held_out) for caption in e.captions}
        with training_mode(), torch.no_grad():
            load_fully([self.models.clip.patcher])
            clip = clip_with_token(self.models.clip, self.subject.placeholder_token, self._initial)
            return {caption: encode_text(clip, [caption]) for caption in sorted({*captions, self.subject.class_word})}

    def _fingerprint(self) -> str:
        word = self.subject.class_word
        names = {"placeholder": self.subject.placeholder_token, "class_word": word}
        if self._begin_with is not None:
            names["begins with"] = digest_of(self._begin_with.lora)
        return training_fingerprint(
            self.models.patcher, self._patched_clip, self.data, word, self.config, self.models.dtype, names
        )

    def _info(self, steps: int) -> AdapterInfo:
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
                **dataclasses.asdict(dataclasses.replace(config, steps=max(steps, 1))),
                "resolution": subject.resolution,
                "pictures": len(subject.pictures),
                "prediction_type": prediction_type(self.models.patcher),
                "fingerprint": self.fingerprint,
            },
            positions=positions(self.description.architecture),
        )


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", FILE_DTYPE).float()
