"""The reference pass of noised mode as further rows of the sampler's UNet call.

A noised reference is encoded at every step. As rows of the sampler's call it needs no kernel launches of its own. The
result is the same. It is possible if the rows fit into one batch and no other pack reads the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ....core.adapter import Adapter
from ....core.image_prompt import ImagePrompt, repeated
from ....core.kv import KVBank
from ....core.reference import KVRecorder
from ....core.site import Site
from ..networks.unet import NetworkInputs
from .foreign import ForeignCode
from .reference_pass import fits_in_memory

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.patcher_extension import WrapperExecutor

    from ..host_types import Arguments, TransformerOptions
    from .sampling_run import BankKey


class BatchedReferences(NamedTuple):
    """An image prompt whose pictures are rows of a UNet call. Its bank is filled during the call."""

    prompt: ImagePrompt
    recorder: KVRecorder
    rows: slice

    @property
    def bank(self) -> KVBank:
        return self.recorder.bank

    def record(self, site: Site) -> None:
        """Record their keys and values at one layer, if the layer is injected."""
        self.recorder.record(site.of_rows(self.rows))


class ExtendedBatch:
    """A UNet call (x, timestep, context, y, control) to which image prompts can be appended as rows."""

    def __init__(
        self,
        executor: WrapperExecutor,
        arguments: Sequence[Any],
        rest: Arguments,
        options: TransformerOptions,
        foreign: ForeignCode,
    ) -> None:
        self.arguments = list(arguments)
        self.pictures: dict[BankKey, BatchedReferences] = {}  # by the keys of their banks
        is_innermost = executor.idx + 1 == len(executor.wrappers)
        is_patched = any(options.get("patches", {}).values()) or any(options.get("patches_replace", {}).values())
        self._can_extend = is_innermost and not is_patched and not rest and not foreign and self.arguments[4] is None

    def can_append(self, prompt: ImagePrompt, adapter: Adapter, base: BaseModel) -> bool:
        """Whether the pictures can be appended, as far as it is known before they are noised.

        They must have the latent's size. The length of the call's text must be a multiple of their texts' lengths. And
        ComfyUI itself must be able to make one call with so many rows.
        """
        x = self.arguments[0]
        if not self._can_extend or torch.compiler.is_compiling():
            return False
        if any(picture.latent.shape[-2:] != x.shape[-2:] for picture in prompt.pictures):
            return False
        length = self.arguments[2].shape[1]
        if any(
            length % (picture.text or adapter.class_conditioning).cross_attn.shape[1] for picture in prompt.pictures
        ):
            return False
        return fits_in_memory(base, [len(x) + len(prompt.pictures), *x.shape[1:]], x.device)

    def append(self, key: BankKey, prompt: ImagePrompt, inputs: NetworkInputs, recorder: KVRecorder) -> bool:
        """Append the pictures as rows. -> False, without a change, if their channels or labels do not match"""
        x, timestep, context, y, control = self.arguments
        if x.shape[1:] != inputs.x.shape[1:] or (y is None) != (inputs.y is None):
            return False
        self.arguments = [
            torch.cat([x, inputs.x]),
            torch.cat([timestep, inputs.timestep.to(timestep)]),
            torch.cat([context, repeated(inputs.context, context.shape[1])]),
            None if y is None else torch.cat([y, inputs.y]),
            control,
        ]
        rows = slice(len(x), len(x) + len(inputs.x))
        self.pictures[key] = BatchedReferences(prompt, recorder, rows)
        return True
