"""Ways to sample the same picture on the same loaded model: plain, injected, and as in other packs.

Import only after the host has started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sa_inject.core.schedule import DEFAULT_STRENGTH

from ..measure import StepClock
from ..reference_only import with_reference_every_step
from ..scenes import Scene
from .lower_bound import Shape

CFG = 7.0
SEED = 1
PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """`at_most`: the project's target for the ratio to plain, for SD1.5 at 512 px and 20 steps."""

    name: str
    mode: str = "clean"  # the adapter's, or "peer"
    references: int = 1
    masked: bool = False
    apply_to: str = "positive"
    strength: float = DEFAULT_STRENGTH
    is_outside: bool = False  # start and end lie between two steps
    at_most: float | None = None

    @property
    def is_silent(self) -> bool:
        return self.strength == 0 or self.is_outside

    @property
    def shape(self) -> Shape:
        reads = {"clean": "once", "noised": "every step", "peer": "whole"}[self.mode]
        return Shape(self.references, self.masked, self.apply_to, reads)


VARIANTS = (
    Variant("clean", at_most=1.12),
    Variant("clean, both rows", apply_to="both"),
    Variant("clean, quarter mask", masked=True, at_most=1.05),
    Variant("clean, quarter mask, both rows", masked=True, apply_to="both"),
    Variant("clean, 4 references", references=4),
    Variant("clean, 4 references, quarter masks", references=4, masked=True, at_most=1.20),
    Variant("noised", mode="noised", at_most=1.65),
    Variant("noised, both rows", mode="noised", apply_to="both"),
    Variant("noised, quarter mask", mode="noised", masked=True),
    Variant("training-free, every step, as peers", mode="peer", apply_to="both"),
    Variant("strength 0", strength=0.0, at_most=1.005),
    Variant("outside start to end", is_outside=True, at_most=1.005),
)
SHORT = ("clean", "clean, quarter mask", "clean, 4 references, quarter masks", "noised", VARIANTS[9].name)


def choose_variants(names: Sequence[str]) -> list[Variant]:
    """The variants of these names, in their own order. "all" and "short" are groups. Raises ValueError."""
    groups = {"all": [variant.name for variant in VARIANTS], "short": list(SHORT)}
    wanted = {name for given in names for name in groups.get(given, [given])}
    unknown = wanted - set(groups["all"])
    if unknown:
        raise ValueError(f"There is no variant {', '.join(sorted(unknown))}. Choose from: {'; '.join(groups['all'])}.")
    return [variant for variant in VARIANTS if variant.name in wanted]


class Clocked(NamedTuple):
    """One run: seconds of every step and of the time after the last, and the number of UNet calls."""

    steps: list[float]
    after: float
    unet_passes: int


class Sampling:
    """Runs a variant as the host's executor would, its Apply node and its KSampler. Loading and encoding are done
    before.
    """

    def __init__(self, host: Any, scene: Scene, steps: int) -> None:
        if steps < 2:
            raise ValueError(f"{steps} sampling steps; the bench needs two, to tell the first from the rest.")
        self.host = host
        self.scene = scene
        self.steps = steps
        self._adapters = {mode: scene.adapter(mode) for mode in ("clean", "noised")}
        self._positive, self._negative = scene.conditioning(11), scene.conditioning(22)
        self._latent = {"samples": torch.zeros(1, 4, scene.latent_side, scene.latent_side)}
        self._prompts = {
            (references, masked): scene.prompt(references, masked) for references in (1, 4) for masked in (False, True)
        }

    def run(self, variant: Variant | None) -> torch.Tensor:
        """Samples of a variant, None for plain."""
        (latent,) = self.host.execute(
            "KSampler",
            model=self.scene.model if variant is None else self._model(variant),
            positive=self._positive,
            negative=self._negative,
            latent_image=self._latent,
            steps=self.steps,
            cfg=CFG,
            seed=SEED,
            sampler_name="euler",
            scheduler="normal",
        )
        return latent["samples"]

    def clocked(self, variant: Variant | None) -> Clocked:
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        handle = self.scene.model.model.diffusion_model.time_embed.register_forward_pre_hook(count)
        try:
            with StepClock(waits=False) as clock:
                self.run(variant)
        finally:
            handle.remove()
        return Clocked(clock.steps(), clock.after(), passes)

    def _model(self, variant: Variant) -> Any:
        prompt = self._prompts[variant.references, variant.masked]
        if variant.mode == "peer":
            blocks = [tuple(layer.key) for layer in self.scene.description.layers]
            return with_reference_every_step(self.scene.model, [p.latent for p in prompt.pictures], blocks)
        start, end = 0.0, 1.0
        if variant.is_outside:  # the steps of the "normal" scheduler are at i / (steps - 1)
            start, end = 0.3 / (self.steps - 1), 0.6 / (self.steps - 1)
        (model,) = self.host.execute(
            "ApplySelfAttnInjection",
            model=self.scene.model,
            adapter=self._adapters[variant.mode],
            image_prompt=prompt,
            strength=variant.strength,
            start_percent=start,
            end_percent=end,
            apply_to=variant.apply_to,
        )
        return model
