"""An injection, and the caches of one sampling run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ....core.adapter import Adapter
from ....core.image_prompt import ImagePrompt
from ....core.kv import BlockKey, KVBank
from ....core.lora import LoRADeltas
from ....core.masks import downsample_mask
from ..progress import warn_on_node
from .foreign import ForeignCode
from .row_texts import GuiderTexts

if TYPE_CHECKING:
    from comfy.hooks import Hook
    from comfy.model_base import BaseModel
    from comfy.samplers import CFGGuider

    from ..host_types import ModelSampling, TransformerOptions

log = logging.getLogger(__name__)

RUN_KEY = "sa_inject_run"

ApplyTo = Literal["positive", "both"]  # which prompts see the reference


@dataclass(frozen=True, eq=False)
class Injection:
    """One Apply node: what to inject, how strongly, where and when."""

    adapter: Adapter
    image_prompt: ImagePrompt
    strength: float
    start_percent: float  # share of the schedule, 0..1, from which on it is active
    end_percent: float
    apply_to: ApplyTo
    blocks: frozenset[BlockKey]
    attn_mask: Tensor | None  # (h, w) in 0..1: the part of the picture in which it is active
    node_id: str | None = None  # of the Apply node, for messages in the frontend

    @property
    def is_noised(self) -> bool:
        return self.adapter.info.reference_mode == "noised"

    @property
    def needs_sigma(self) -> bool:
        return self.is_noised or self.start_percent > 0 or self.end_percent < 1

    @property
    def needs_full_pass(self) -> bool:
        """Whether a separate reference pass would have to run the network up to its last layer."""
        return self.adapter.info.layers[-1].key in self.blocks

    def active_at(self, sigma: float | None, sampling: ModelSampling) -> bool:
        """Evaluated while sampling, because a later node may have changed the schedule."""
        if sigma is None:
            return True
        return sampling.percent_to_sigma(self.end_percent) <= sigma <= sampling.percent_to_sigma(self.start_percent)


class BankKey(NamedTuple):
    """Everything that the keys and values of an image prompt depend on within a run."""

    source: tuple  # the injection, the network, device and precision
    sigma: float | None  # of a noised reference
    hooks: tuple  # of the current conditioning: they change the weights
    strengths: tuple[float, ...]  # of these hooks, at this step of their schedule

    def replaces(self, other: BankKey) -> bool:
        """Whether the other is not needed any more, because sigma or the strength of a hook has changed."""
        if self.source != other.source or self == other:
            return False
        return self.sigma != other.sigma or self.hooks == other.hooks


@dataclass(eq=False)
class SamplingRun:
    """The caches of one run. A UNet call outside of a run gets one without guider, size and sigmas."""

    seed: int = 0
    guider: CFGGuider | None = None
    size: tuple[int, ...] | None = None  # (h, w) of the latent
    steps: int | None = None
    banks: dict[BankKey, KVBank] = field(default_factory=dict)
    deltas: dict[tuple, LoRADeltas] = field(default_factory=dict)
    downsampled_masks: dict[tuple, Tensor] = field(default_factory=dict)
    foreign: dict[int, ForeignCode | None] = field(default_factory=dict)
    texts: GuiderTexts = field(default_factory=GuiderTexts)
    was_active: dict[int, bool] = field(default_factory=dict)  # by id of the injection, for injections with rows
    skipped: dict[str, set[BlockKey]] = field(default_factory=dict)  # by reason; no blocks: the whole call
    has_warned_of_compilation: bool = False

    def bank_key(
        self, injection: Injection, unet: nn.Module, base: BaseModel, sigma: float | None, x: Tensor
    ) -> BankKey:
        """The key of this call's bank. Banks that are not needed any more are dropped."""
        hooks = hooks_in_force(base)
        key = BankKey(
            (id(injection), id(unet), x.device, x.dtype),
            sigma if injection.is_noised else None,
            tuple(hook.hook_ref for hook in hooks),
            tuple(hook.strength for hook in hooks),
        )
        for stale in [other for other in self.banks if key.replaces(other)]:
            del self.banks[stale]
        return key

    def deltas_of(self, adapter: Adapter, x: Tensor) -> LoRADeltas:
        """The adapter's LoRA on the device of x and in its precision."""
        key = (id(adapter), x.device, x.dtype)
        if key not in self.deltas:
            self.deltas[key] = adapter.lora.deltas(x.device, x.dtype)
        return self.deltas[key]

    def mask_weights(self, injection: Injection, height: int, width: int, device: torch.device) -> Tensor:
        """An injection's attention mask at one layer's size. -> (height*width,)"""
        key = (id(injection), height, width, device)
        if key not in self.downsampled_masks:
            assert injection.attn_mask is not None
            self.downsampled_masks[key] = downsample_mask(injection.attn_mask, height, width).to(device)
        return self.downsampled_masks[key]

    def is_active(self, injection: Injection, sigma: float | None, sampling: ModelSampling) -> bool:
        active = injection.active_at(sigma, sampling)
        self.was_active[id(injection)] = active or self.was_active.get(id(injection), False)
        return active

    def record_skip(self, reason: str, *blocks: BlockKey) -> None:
        self.skipped.setdefault(reason, set()).update(blocks)

    def report(self, injections: Sequence[Injection]) -> None:
        for reason, blocks in self.skipped.items():
            where = ", ".join(map(str, sorted(blocks))) or "some calls of the model"
            log.info("SA-Inject skipped injection in %s: %s.", where, reason)
        for injection in injections:
            if self.was_active.get(id(injection)) is False:
                self._warn_nothing_injected(injection)

    def _warn_nothing_injected(self, injection: Injection) -> None:
        steps = "no step" if self.steps is None else f"none of the {self.steps} steps"
        message = (
            f"{steps} of this run lay between start_percent {injection.start_percent:g} and end_percent "
            f"{injection.end_percent:g}, so the image prompt was not used. Take more steps, or lower start_percent: "
            f"0 acts from the first step on."
        )
        warn_on_node(message, injection.node_id)


def sigma_of(options: TransformerOptions) -> float | None:
    sigmas = options.get("sigmas")
    return None if sigmas is None else float(sigmas.flatten()[0])


def hooks_in_force(base: BaseModel) -> list[Hook]:
    """The hooks of the current conditioning, whose weights the model has at the moment."""
    group = getattr(getattr(base, "current_patcher", None), "current_hooks", None)
    return [] if group is None else list(group.hooks)


def warn_of_another_shape(injection: Injection, height: int, width: int) -> None:
    """Warn if an attention mask has another aspect ratio than the latent (height, width) of a run.

    Nodes that sample a large picture in tiles start a run for each, and do not tell the tile's position. Differences
    below one latent pixel come from rounding and are accepted.
    """
    if injection.attn_mask is None:
        return
    rows, columns = injection.attn_mask.shape
    if min(abs(rows * width / columns - height), abs(columns * height / rows - width)) < 1:
        return
    message = (
        f"attn_mask is {columns}x{rows}, but this run draws a picture of {width * 8}x{height * 8}, which is of "
        f"another shape. The mask is stretched over it. If this run draws only a part of a larger picture, such as a "
        f"tile or a face, the mask does not fit: leave attn_mask open there."
    )
    warn_on_node(message, injection.node_id)
