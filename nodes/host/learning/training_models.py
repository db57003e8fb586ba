"""The models of one training: loaded, made differentiable, and restored at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import comfy.model_management as model_management
import torch

from ..networks.registry import is_transformer
from ..networks.unet import compute_dtype
from .autograd import (
    checkpoint_activations,
    make_differentiable,
    memory_efficient_layers,
    out_of_place_text_encoder,
    recompute_cheap_ops,
    training_mode,
)
from .plain_weights import plain_weights
from .transformer_blocks import transformer_gradients

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

PRECISIONS: dict[str, torch.dtype | None] = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


class TrainingModels:
    """A base model and its text encoder. All weights keep their values, and all patches are removed at the end."""

    dtype: torch.dtype  # of the computation, from `loaded` on

    def __init__(
        self, model: ModelPatcher, clip: CLIP, *, precision: str = "auto", checkpointing: bool = False
    ) -> None:
        """precision: a key of PRECISIONS. checkpointing: store fewer activations, and recompute them."""
        self.patcher = model.clone()  # it shares the weights, and may have another precision
        self.clip = clip
        self.checkpointing = checkpointing  # a change is used from the next load on
        self.needs_clip = True  # False: all texts are encoded already
        self._forced_dtype = PRECISIONS[precision]
        if self._forced_dtype is not None:
            self.patcher.set_model_compute_dtype(self._forced_dtype)

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        try:
            self._load()
            yield
        finally:
            self._undo.close()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Inside `loaded`: undo all changes and use inference mode, as other nodes need it. Afterwards load again."""
        self._undo.close()
        with torch.inference_mode():
            yield
        self._load()

    def make_models_differentiable(self, undo: contextlib.ExitStack) -> torch.dtype:
        """Make both loaded models differentiable. -> the precision of the network's computation"""
        base, encoder = self.patcher.model, self.clip.cond_stage_model
        network = base.diffusion_model
        undo.enter_context(plain_weights(self.patcher, *([self.clip.patcher] if self.needs_clip else [])))
        make_differentiable(base)
        make_differentiable(encoder)
        undo.enter_context(memory_efficient_layers(network, encoder))
        if is_transformer(network):
            undo.enter_context(transformer_gradients(network, self.checkpointing))
        else:
            save_activation_memory = checkpoint_activations if self.checkpointing else recompute_cheap_ops
            undo.enter_context(save_activation_memory(network))
        dtype = compute_dtype(base)
        # Not float16: the activations of some text encoders overflow in it.
        text_dtype = dtype if dtype == torch.bfloat16 else torch.float32
        undo.enter_context(out_of_place_text_encoder(self.clip, self.checkpointing, text_dtype))
        return dtype

    def _load(self) -> None:
        self._undo = contextlib.ExitStack()
        self._undo.callback(self._unload)
        try:
            self._undo.enter_context(training_mode())
            load_fully([self.patcher, *([self.clip.patcher] if self.needs_clip else [])])
            self.dtype = self.make_models_differentiable(self._undo)
        except BaseException:
            self._undo.close()
            raise

    def _unload(self) -> None:
        if self._forced_dtype is not None:
            # After a full load, unpatching does not remove the forced casts. The next partial load would take these
            # layers for offloaded ones, and skip the user's LoRA on them.
            self.patcher.model.model_lowvram = True
            self.patcher.unpatch_model(self.patcher.offload_device)
        model_management.soft_empty_cache()


def load_fully(patchers: list[ModelPatcher]) -> None:
    """Load models completely. The requested memory exceeds any device, so all other models are unloaded."""
    model_management.load_models_gpu(patchers, memory_required=1e20, force_full_load=True)
