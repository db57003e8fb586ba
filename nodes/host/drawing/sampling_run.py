"""What is to be injected, and what lives as long as one sampling run."""

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
    start_percent: float  # share of the schedule at which it begins to act
    end_percent: float
    apply_to: ApplyTo
    blocks: frozenset[BlockKey]
    attn_mask: Tensor | None  # (h, w) in 0..1: where in the picture the reference may act
    node_id: str | None = None  # of the Apply node, where the frontend can show a word

    @property
    def is_noised(self) -> bool:
        return self.adapter.info.reference_mode == "noised"

    @property
    def needs_sigma(self) -> bool:
        return self.is_noised or self.start_percent > 0 or self.end_percent < 1

    @property
    def needs_full_pass(self) -> bool:
        """Whether a reference pass of its own could stop no earlier than the UNet does."""
        return self.adapter.info.layers[-1].key in self.blocks

    def active_at(self, sigma: float | None, sampling: ModelSampling) -> bool:
        """Asked while sampling, for a node after ours may have changed the schedule."""
        if sigma is None:
            return True
        return sampling.percent_to_sigma(self.end_percent) <= sigma <= sampling.percent_to_sigma(self.start_percent)


class BankKey(NamedTuple):
    """What the keys and values of an image prompt depend on within a run."""

    place: tuple  # the injection, the network, device and precision
    sigma: float | None  # of a noised reference
    hooks: tuple  # of the conditioning that is drawn: they change the weights
    strengths: tuple[float, ...]  # of these hooks, at this step of their schedule

    def replaces(self, other: BankKey) -> bool:
        """Whether nobody will ask for the other again: the noise level, or a hook's strength, has moved on."""
        if self.place != other.place or self == other:
            return False
        return self.sigma != other.sigma or self.hooks == other.hooks


@dataclass(eq=False)
class SamplingRun:
    """Without a guider, size and sigmas for a UNet call outside of a sampling run."""

    seed: int = 0
    guider: CFGGuider | None = None
    size: tuple[int, ...] | None = None  # (h, w) of the latent that is drawn
    steps: int | None = None
    banks: dict[BankKey, KVBank] = field(default_factory=dict)
    deltas: dict[tuple, LoRADeltas] = field(default_factory=dict)
    downsampled_masks: dict[tuple, Tensor] = field(default_factory=dict)
    foreign: dict[int, ForeignCode | None] = field(default_factory=dict)
    texts: GuiderTexts = field(default_factory=GuiderTexts)
    was_active: dict[int, bool] = field(default_factory=dict)  # by injection, of those with rows to act on
    skipped: dict[str, set[BlockKey]] = field(default_factory=dict)  # no blocks: in the whole call
    is_told_of_compilation: bool = False

    def bank_key(
        self, injection: Injection, unet: nn.Module, base: BaseModel, sigma: float | None, x: Tensor
    ) -> BankKey:
        """What a bank for this call is found by. Banks that nobody will ask for again are dropped."""
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
        """The adapter's LoRA where x is, and in its precision."""
        key = (id(adapter), x.device, x.dtype)
        if key not in self.deltas:
            self.deltas[key] = adapter.lora.deltas(x.device, x.dtype)
        return self.deltas[key]

    def mask_weights(self, injection: Injection, height: int, width: int, device: torch.device) -> Tensor:
        """The attention mask of an injection at one layer's size: (height*width,), the same at every step."""
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
        said = (
            f"{steps} of this run lay between start_percent {injection.start_percent:g} and end_percent "
            f"{injection.end_percent:g}, so the image prompt was not used. Take more steps, or lower start_percent: "
            f"0 acts from the first step on."
        )
        warn_on_node(said, injection.node_id)


def sigma_of(options: TransformerOptions) -> float | None:
    sigmas = options.get("sigmas")
    return None if sigmas is None else float(sigmas.flatten()[0])


def hooks_in_force(base: BaseModel) -> list[Hook]:
    """The hooks whose weights the model has at the moment, which belong to the conditioning that is drawn."""
    group = getattr(getattr(base, "current_patcher", None), "current_hooks", None)
    return [] if group is None else list(group.hooks)


def warn_of_another_shape(injection: Injection, height: int, width: int) -> None:
    """Say that an attention mask is not shaped like the latent (height, width) that a run draws.

    A node that draws a large picture in pieces starts a run for each of them, and nothing says where a piece lies.
    Less than one cell of the latent is what rounding explains.
    """
    if injection.attn_mask is None:
        return
    rows, columns = injection.attn_mask.shape
    if min(abs(rows * width / columns - height), abs(columns * height / rows - width)) < 1:
        return
    said = (
        f"attn_mask is {columns}x{rows}, but this run draws a picture of {width * 8}x{height * 8}, which is of "
        f"another shape. The mask is stretched over it. If this run draws only a part of a larger picture, such as a "
        f"tile or a face, the mask does not fit: leave attn_mask open there."
    )
    warn_on_node(said, injection.node_id)
