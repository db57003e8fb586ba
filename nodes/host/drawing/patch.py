"""Patches a ModelPatcher so that its UNet attends to image prompts while it samples.

No static patch is installed. One wrapper around every UNet call copies the call's options and adds its function there.
So it sees the patches of all other packs, also those that are added while sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ....core.kv import KVBank
from ....core.reference import KVRecorder
from ..networks.unet_sites import attending, replaced_blocks
from .batched_reference import ExtendedBatch
from .foreign import ForeignCode, foreign_code
from .injected import REPLACED, InjectedCall, Source
from .reference_call import DrawingCall
from .reference_pass import encode_references, join_images, reference_inputs
from .row_texts import conditional_rows, is_plain_call
from .sampling_run import RUN_KEY, BankKey, Injection, SamplingRun, sigma_of, warn_of_another_shape

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import WrapperExecutor

    from ..host_types import Arguments, TransformerOptions

# A compiled model traces our wrapper too. The reference pass and its caches would cause a recompilation in each step.
# Any: torch does not keep the function's type.
uncompiled_encode_references: Any = torch.compiler.disable(encode_references)
uncompiled_foreign_code: Any = torch.compiler.disable(foreign_code)

WRAPPER_KEY = "sa_inject"
OUTER_SAMPLE_ARGUMENTS = (
    "noise",
    "latent_image",
    "sampler",
    "sigmas",
    "denoise_mask",
    "callback",
    "disable_pbar",
    "seed",
)
CALL_ARGUMENTS = ("x", "timesteps", "context", "y", "control", "transformer_options")


def patch_self_attention(
    model: ModelPatcher, injection: Injection, wrapper_class: type[SelfAttentionInjection]
) -> ModelPatcher:
    """Return a clone of the model with this injection added. Earlier injections stay, and all are summed.

    wrapper_class: the wrapper for the calls of this kind of network.
    """
    patched = model.clone()
    earlier = _installed(patched)
    wrapper = wrapper_class(patched.model, (*(earlier.injections if earlier else ()), injection))
    for kind, function in (
        (WrappersMP.OUTER_SAMPLE, wrapper.outer_sample_wrapper),
        (WrappersMP.PREPARE_SAMPLING, wrapper.prepare_sampling_wrapper),
        (WrappersMP.DIFFUSION_MODEL, wrapper),
    ):
        patched.wrappers.setdefault(kind, {})[WRAPPER_KEY] = [function]
    return patched


def _installed(patcher: ModelPatcher) -> SelfAttentionInjection | None:
    found = patcher.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).get(WRAPPER_KEY, [])
    return found[0] if found else None


def installed_injections(patcher: ModelPatcher) -> tuple[Injection, ...]:
    """The injections of a model, in the order of its Apply nodes."""
    found = _installed(patcher)
    return found.injections if found else ()


class SelfAttentionInjection:
    """The wrapper around every UNet call, and two more around the sampling run. It has no state."""

    def __init__(self, base: BaseModel, injections: Sequence[Injection]) -> None:
        self.base = base
        self.injections = tuple(injections)

    def outer_sample_wrapper(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
        """Create the SamplingRun of the calls inside. It is dropped with its banks, also after an exception."""
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        named = {**dict(zip(OUTER_SAMPLE_ARGUMENTS, args, strict=False)), **kwargs}
        size, sigmas = tuple(named["noise"].shape[-2:]), named.get("sigmas")
        for injection in self.injections:
            warn_of_another_shape(injection, *size)
        run = options[RUN_KEY] = SamplingRun(
            seed=named.get("seed") or 0,
            guider=executor.class_obj,
            size=size,
            steps=None if sigmas is None else max(0, len(sigmas) - 1),
        )
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(RUN_KEY, None)
            run.report(self.injections)

    def prepare_sampling_wrapper(
        self, executor: WrapperExecutor, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any
    ):
        """Reserve memory for the reference pass: its pictures count as further rows of the batch."""
        cells = sum(p.latent.shape[-2] * p.latent.shape[-1] for i in self.injections for p in i.image_prompt.pictures)
        rows = -(-cells // (noise_shape[-2] * noise_shape[-1]))
        return executor(model, [noise_shape[0] + rows, *noise_shape[1:]], *args, **kwargs)

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
        arguments, kwargs, options = _take_options(args, kwargs)
        run = options.get(RUN_KEY) or SamplingRun()
        unet, x = executor.class_obj, arguments[0]
        # Reading the value waits for the device, so it is read only if it is needed.
        sigma = sigma_of(options) if any(injection.needs_sigma for injection in self.injections) else None
        seen = self._rows(run, executor, arguments, options)
        seen = [(i, rows) for i, rows in seen if run.is_active(i, sigma, self.base.model_sampling)]
        foreign = self._foreign(run, unet, arguments[2]) if seen else None
        if foreign is None:
            return executor(*arguments, options, **kwargs)
        extended = ExtendedBatch(executor, arguments, kwargs, options, foreign)
        drawing = DrawingCall(unet, executor.original, x, arguments[3], kwargs, options, foreign)
        sources = []
        for injection, rows in seen:
            if foreign.attention:
                run.record_skip(REPLACED, *(injection.blocks & foreign.attention))
            if not injection.blocks <= foreign.attention:
                bank = self._bank(run, injection, unet, sigma, drawing, extended)
                sources.append(Source(injection, rows, bank))
        if not sources:
            return executor(*arguments, options, **kwargs)
        injected = InjectedCall(sources, run, list(extended.pictures.values()))
        replaced = replaced_blocks(options, injected.blocks)
        if replaced:
            # Guidance nodes return a deliberately degraded attention, to which nothing may be added.
            run.record_skip(REPLACED, *replaced)
        with attending(
            unet, options, injected.at, injected.blocks - replaced, keeps_hidden=bool(extended.pictures)
        ) as options:
            out = executor(*extended.arguments, options, **kwargs)
        run.banks.update((key, pictures.bank) for key, pictures in extended.pictures.items())
        return out[: len(x)] if extended.pictures else out

    def _rows(
        self, run: SamplingRun, executor: WrapperExecutor, arguments: Sequence[Any], options: TransformerOptions
    ) -> list[tuple[Injection, Sequence[bool]]]:
        """The injections with rows in this call, and for each row whether the injection applies to it."""
        x = arguments[0]
        is_part = run.size not in (None, tuple(x.shape[-2:]))
        conditional: Sequence[bool] | None = None
        if any(injection.apply_to == "positive" for injection in self.injections):
            is_plain = is_plain_call(executor, run.guider, self.base, options)
            conditional = conditional_rows(run.guider, run.texts, options, arguments, is_plain)
            if conditional is None:
                run.record_skip("nothing tells which of their rows belong to the positive prompt")
        seen = []
        for injection in self.injections:
            rows = conditional if injection.apply_to == "positive" else [True] * len(x)
            if rows is None or not any(rows):
                continue
            if is_part and injection.attn_mask is not None:
                run.record_skip("they draw only a part of the picture, so attn_mask cannot be placed")
            else:
                seen.append((injection, rows))
        return seen

    def _foreign(self, run: SamplingRun, unet: nn.Module, context: Tensor) -> ForeignCode | None:
        """Foreign code in the network of this call. None: the adapters were trained for another network."""
        if id(unet) not in run.foreign:
            run.foreign[id(unet)] = uncompiled_foreign_code(unet, self.injections[0].adapter.info.layers)
        found = run.foreign[id(unet)]
        if found is None or context.shape[-1] != self.base.model_config.unet_config["context_dim"]:
            run.record_skip("they go to another network than the one that the adapter was made for")
            return None
        return found

    def _bank(
        self,
        run: SamplingRun,
        injection: Injection,
        unet: nn.Module,
        sigma: float | None,
        drawing: DrawingCall,
        extended: ExtendedBatch,
    ) -> KVBank:
        """The bank for this call: from the cache, encoded now, or filled while the references are rows of this call."""
        x = drawing.x
        key: BankKey = run.bank_key(injection, unet, self.base, sigma, x)
        if key in run.banks:
            return run.banks[key]
        adapter, prompt = injection.adapter, injection.image_prompt
        level = sigma if injection.is_noised else None
        deltas = run.deltas_of(adapter, x)
        if injection.is_noised and injection.needs_full_pass and extended.can_append(prompt, adapter, self.base):
            indices = range(len(prompt.pictures))
            inputs = reference_inputs(self.base, adapter, prompt.pictures, indices, level, run.seed, x)
            select = partial(join_images, pictures=prompt.pictures)
            recorder = KVRecorder(injection.blocks, deltas, select=select)
            if extended.append(key, prompt, inputs, recorder):
                return extended.pictures[key].bank
        run.banks[key] = uncompiled_encode_references(
            drawing,
            self.base,
            adapter,
            prompt,
            sigma=level,
            noise_seed=run.seed,
            blocks=injection.blocks,
            deltas=deltas,
        )
        return run.banks[key]


def _take_options(args: Sequence[Any], kwargs: Arguments) -> tuple[list[Any], Arguments, TransformerOptions]:
    """Take transformer_options out of the arguments of a UNet call, which may be positional or named.

    -> [x, timestep, context, y, control], further arguments, transformer_options
    """
    kwargs = dict(kwargs)
    named = [kwargs.pop(name, None) for name in CALL_ARGUMENTS[len(args) :]]
    *arguments, options = [*args, *named]
    return arguments, kwargs, {} if options is None else options
