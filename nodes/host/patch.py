"""Patches a ModelPatcher so that its UNet attends to image prompts while it samples.

Nothing static is installed. One wrapper around every UNet call puts its function over whatever other packs have in
that call's options, so it sees all of them, and forgets it afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...core.adapter import Adapter
from ...core.attention import Attention
from ...core.image_prompt import ImagePrompt
from ...core.injection import Reference, said
from ...core.kv import BlockKey, KVBank
from ...core.lora import Deltas
from ...core.masks import token_weights
from ...core.reference import ReferenceRecorder, block_key, keep_hidden
from .bank import host_attention, read_image_prompt, reference_inputs
from .joined import JoinedPictures, LargerCall

log = logging.getLogger(__name__)

# A compiled model traces our wrapper too; the reference pass and its caches would make it compile again and again.
uncompiled_read_image_prompt: Any = torch.compiler.disable(read_image_prompt)

WRAPPER_KEY = "sa_inject"
RUN_KEY = "sa_inject_run"
CONDITIONAL = 0  # how ComfyUI's own guiders mark a chunk of conditional rows in `cond_or_uncond`

Rows = Literal["conditional", "both"]
AttentionPatch = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class Injection:
    """One Apply node: what to inject, how strongly, where and when."""

    adapter: Adapter
    image_prompt: ImagePrompt
    strength: float
    start_percent: float  # share of the schedule at which it begins to act
    end_percent: float
    rows: Rows
    blocks: frozenset[BlockKey]
    area: Tensor | None  # (h, w) in 0..1: where in the picture the reference may act

    @property
    def is_matched(self) -> bool:
        return self.adapter.info.reference_mode == "matched"

    @property
    def asks_for_noise_level(self) -> bool:
        return self.is_matched or self.start_percent > 0 or self.end_percent < 1

    @property
    def reads_to_the_end(self) -> bool:
        """Whether a reference pass of its own could stop no earlier than the UNet does."""
        return self.adapter.info.layers[-1].key in self.blocks

    def active_at(self, sigma: float | None, sampling: Any) -> bool:
        """Asked while sampling, for a node after ours may have changed the schedule."""
        if sigma is None:
            return True
        return sampling.percent_to_sigma(self.end_percent) <= sigma <= sampling.percent_to_sigma(self.start_percent)


@dataclass(eq=False)
class SamplingRun:
    """What lives as long as one sampling run: the banks, and what there is to tell at its end."""

    seed: int = 0
    guider: Any = None  # None, as all of the rest, for a UNet call outside of a sampling run
    size: tuple[int, ...] | None = None  # (h, w) of the latent that is drawn
    banks: dict[tuple, KVBank] = field(default_factory=dict)
    deltas: dict[tuple, Deltas] = field(default_factory=dict)
    areas: dict[tuple, Tensor] = field(default_factory=dict)
    stepped_aside: dict[str, set[BlockKey]] = field(default_factory=dict)  # no blocks: in the whole call

    def bank_key(self, injection: Injection, sigma: float | None, x: Tensor) -> tuple:
        """What a bank for this call is found by. Banks of another noise level are dropped: there is one at a time."""
        place = (id(injection), x.device, x.dtype)
        key = (*place, sigma if injection.is_matched else None)
        for stale in [k for k in self.banks if k[:3] == place and k != key]:
            del self.banks[stale]
        return key

    def deltas_of(self, adapter: Adapter, x: Tensor) -> Deltas:
        """The adapter's LoRA where x is, and in its precision."""
        key = (id(adapter), x.device, x.dtype)
        if key not in self.deltas:
            self.deltas[key] = adapter.lora.deltas(x.device, x.dtype)
        return self.deltas[key]

    def area_weights(self, injection: Injection, height: int, width: int, device: torch.device) -> Tensor:
        """The area mask of an injection at one layer's size: (height*width,), the same at every step."""
        key = (id(injection), height, width, device)
        if key not in self.areas:
            assert injection.area is not None
            self.areas[key] = token_weights(injection.area, height, width).to(device)
        return self.areas[key]

    def step_aside(self, reason: str, *blocks: BlockKey) -> None:
        self.stepped_aside.setdefault(reason, set()).update(blocks)

    def report(self) -> None:
        for reason, blocks in self.stepped_aside.items():
            where = ", ".join(map(str, sorted(blocks))) or "some calls of the UNet"
            log.info("SA-Inject stepped aside in %s: %s.", where, reason)

    def conditional_chunks(self, options: dict[str, Any]) -> frozenset[int]:
        """The chunks of a UNet call that read the positive text."""
        kinds = options.get("cond_or_uncond") or [CONDITIONAL]
        uuids = options.get("uuids", [])
        if len(uuids) != len(kinds):
            uuids = [None] * len(kinds)
        chunks = enumerate(zip(kinds, uuids, strict=True))
        return frozenset(place for place, (kind, uuid) in chunks if self._is_conditional(kind, uuid))

    def _is_conditional(self, kind: int, uuid: Any) -> bool:
        """`kind` is a cond's place in the list that was handed over, and not every list opens with the positive:
        DualCFGGuider's does not, nor does the extra pass of a guidance node. The cond's own id says more, but ComfyUI
        copies ids from positive to negative for areas; then the place has to do.
        """
        conds = getattr(self.guider, "conds", {})
        owners = [name for name, entries in conds.items() if any(c.get("uuid", self) == uuid for c in entries)]
        is_positive = {name == "positive" for name in owners}
        if "positive" not in conds or len(is_positive) != 1:
            return kind == CONDITIONAL
        return is_positive == {True}


def patch_self_attention(model: Any, injection: Injection) -> Any:
    """Return a clone of the model that injects; injections that it already has stay and add up."""
    patched = model.clone()
    earlier = _installed(patched)
    wrapper = SelfAttentionInjection(patched.model, (*(earlier.injections if earlier else ()), injection))
    for kind, function in (
        (WrappersMP.OUTER_SAMPLE, wrapper.around_sampling),
        (WrappersMP.PREPARE_SAMPLING, wrapper.around_preparation),
        (WrappersMP.DIFFUSION_MODEL, wrapper),
    ):
        patched.wrappers.setdefault(kind, {})[WRAPPER_KEY] = [function]
    return patched


def _installed(patcher: Any) -> SelfAttentionInjection | None:
    found = patcher.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).get(WRAPPER_KEY, [])
    return found[0] if found else None


class SelfAttentionInjection:
    """The wrapper around every UNet call, and its two companions around the run. It holds no state of its own."""

    def __init__(self, base: Any, injections: Sequence[Injection]) -> None:
        self.base = base
        self.injections = tuple(injections)

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a SamplingRun for the calls inside, and drop it with all its banks whatever happens."""
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        seed = kwargs.get("seed", args[7] if len(args) > 7 else None)
        noise = args[0] if args else kwargs["noise"]
        run = options[RUN_KEY] = SamplingRun(seed or 0, executor.class_obj, tuple(noise.shape[-2:]))
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(RUN_KEY, None)
            run.report()

    def around_preparation(self, executor: Any, model: Any, noise_shape: Sequence[int], *args: Any, **kwargs: Any):
        """Ask for room for the reference pass: its pictures count as further rows of the batch."""
        cells = sum(p.latent.shape[-2] * p.latent.shape[-1] for i in self.injections for p in i.image_prompt.pictures)
        rows = -(-cells // (noise_shape[-2] * noise_shape[-1]))
        return executor(model, [noise_shape[0] + rows, *noise_shape[1:]], *args, **kwargs)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        positional, kwargs, options = _take_options(args, kwargs)
        # Reading it lets the device finish first.
        sigma = _sigma(options) if any(injection.asks_for_noise_level for injection in self.injections) else None
        run = options.get(RUN_KEY) or SamplingRun()
        chunk_count = len(options.get("cond_or_uncond") or [CONDITIONAL])
        conditional = run.conditional_chunks(options)
        is_part = run.size not in (None, tuple(positional[0].shape[-2:]))
        call = LargerCall(executor, positional, kwargs, options)
        sources = []
        for injection in self.injections:
            chunks = frozenset(range(chunk_count)) if injection.rows == "both" else conditional
            if not chunks or not injection.active_at(sigma, self.base.model_sampling):
                continue
            if is_part and injection.area is not None:
                run.step_aside("they draw only a part of the picture, so the area mask cannot be placed")
                continue
            bank = self._bank(run, injection, sigma, executor.original, call, positional[0], options)
            sources.append(_Source(injection, chunks, bank))
        if sources:
            options = _with_injection(options, sources, chunk_count, run, list(call.pictures.values()))
        out = executor(*call.arguments, options, **kwargs)
        run.banks.update((key, pictures.bank) for key, pictures in call.pictures.items())
        return out[: len(positional[0])] if call.pictures else out

    def _bank(
        self,
        run: SamplingRun,
        injection: Injection,
        sigma: float | None,
        unet: Any,
        call: LargerCall,
        x: Tensor,
        options: dict,
    ) -> KVBank:
        """The bank for this call: there already, read now, or one that fills as the pictures go through with x."""
        key = run.bank_key(injection, sigma, x)
        if key in run.banks:
            return run.banks[key]
        adapter, prompt = injection.adapter, injection.image_prompt
        level = sigma if injection.is_matched else None
        deltas = run.deltas_of(adapter, x)
        if injection.is_matched and injection.reads_to_the_end and call.may_take(prompt, self.base):
            places = range(len(prompt.pictures))
            inputs = reference_inputs(self.base, adapter, prompt.pictures, places, level, run.seed, x)
            last = adapter.info.layers[-1].key
            recorder = ReferenceRecorder(injection.blocks, last, deltas, host_attention(options))
            if call.join(key, prompt, inputs, recorder):
                return call.pictures[key].bank
        run.banks[key] = uncompiled_read_image_prompt(
            unet,
            self.base,
            adapter,
            prompt,
            sigma=level,
            noise_seed=run.seed,
            blocks=injection.blocks,
            deltas=deltas,
            like=x,
            attention_options=_attention_override(options),
        )
        return run.banks[key]


@dataclass(frozen=True, eq=False)
class _Source:
    injection: Injection
    chunks: frozenset[int]  # which chunks of the batch see it
    bank: KVBank


def _with_injection(
    options: dict[str, Any],
    sources: Sequence[_Source],
    chunk_count: int,
    run: SamplingRun,
    joined: Sequence[JoinedPictures],
) -> dict[str, Any]:
    """Copy the call's options and put the injection over every block that a bank covers."""
    patches = options.get("patches", {})
    if joined:
        patches = {**patches, "attn1_patch": [keep_hidden]}
    replaced = options.get("patches_replace", {})
    attn1 = dict(replaced.get("attn1", {}))
    runs = _runs_of_equal_sources(sources, chunk_count)
    for key in {key for source in sources for key in source.injection.blocks}:
        earlier = attn1.get(tuple(key)) or attn1.get((key.stage, key.index))
        attn1[tuple(key)] = _InjectedAttention(runs, chunk_count, earlier, run, joined)
    return {**options, "patches": patches, "patches_replace": {**replaced, "attn1": attn1}}


class _InjectedAttention:
    """The attention of one block while it is injected; lives for one UNet call."""

    def __init__(
        self,
        runs: Sequence[tuple[range, list[_Source]]],
        chunk_count: int,
        earlier: AttentionPatch | None,
        run: SamplingRun,
        joined: Sequence[JoinedPictures],
    ) -> None:
        self._runs = runs
        self._chunk_count = chunk_count
        self._earlier = earlier
        self._run = run
        self._joined = joined

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        key = block_key(extra_options)
        if self._earlier is not None:
            # What it returns may be meant to be wrong, as guidance nodes do it: nothing is added to that.
            self._run.step_aside("another node replaces the self-attention there", key)
            return self._earlier(q, k, v, extra_options)
        if q.shape[0] != k.shape[0]:
            # Tiling nodes fold tiles of q into the batch and leave k and v whole; the kernels would reshape them so.
            k, v = (x.reshape(q.shape[0], -1, x.shape[-1]) for x in (k, v))
        for pictures in self._joined:
            pictures.record(key, k, v, extra_options)
        own_rows = self._joined[0].rows.start if self._joined else q.shape[0]
        rows = own_rows // self._chunk_count
        given = [
            (slice(chunks.start * rows, chunks.stop * rows), self._references(sources, key, q, extra_options))
            for chunks, sources in self._runs
        ]
        return attend_and_inject(q, k, v, given, extra_options["n_heads"], host_attention(extra_options))

    def _references(
        self, sources: Sequence[_Source], key: BlockKey, q: Tensor, extra_options: dict[str, Any]
    ) -> list[Reference]:
        references = []
        for source in sources:
            if key not in source.bank:
                continue
            injection = source.injection
            query_mask = None
            if injection.area is not None:
                height, width = extra_options["activations_shape"][-2:]
                if height * width != q.shape[1]:
                    self._run.step_aside("tokens were merged or tiled there, so the area mask cannot be placed", key)
                    continue
                query_mask = self._run.area_weights(injection, height, width, q.device)
            references.append(Reference(source.bank[key], injection.strength, query_mask=query_mask))
        return references


def attend_and_inject(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Sequence[tuple[slice, Sequence[Reference]]],
    heads: int,
    attend: Attention,
) -> Tensor:
    """One call for all rows as without us, and one more for the rows that are given references."""
    out = attend(q, k, v, heads)  # (b, n, heads*d)
    for rows, references in given:
        for reference in references:
            # In place: nothing is copied, and the weight costs nothing.
            out[rows].add_(said(q[rows], reference, heads, attend), alpha=reference.weight)
    return out


def _runs_of_equal_sources(sources: Sequence[_Source], chunk_count: int) -> list[tuple[range, list[_Source]]]:
    """Neighbouring chunks that see the same sources, so that each run of them is one call; those that see none are
    left out."""
    runs: list[tuple[range, list[_Source]]] = []
    for chunk in range(chunk_count):
        seen = [source for source in sources if chunk in source.chunks]
        if runs and runs[-1][0].stop == chunk and runs[-1][1] == seen:
            runs[-1] = range(runs[-1][0].start, chunk + 1), seen
        elif seen:
            runs.append((range(chunk, chunk + 1), seen))
    return runs


def _take_options(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any], dict[str, Any]]:
    """Split transformer_options off a UNet call (x, timestep, context, y, control, transformer_options)."""
    if "transformer_options" in kwargs:
        kwargs = dict(kwargs)
        options = kwargs.pop("transformer_options")
        names = ("context", "y", "control")[len(args) - 2 :]
        return [*args, *(kwargs.pop(name, None) for name in names)], kwargs, options
    return args[:5], kwargs, args[5] if len(args) > 5 else {}


def _sigma(options: dict[str, Any]) -> float | None:
    sigmas = options.get("sigmas")
    return None if sigmas is None else float(sigmas.flatten()[0])


def _attention_override(options: dict[str, Any]) -> dict[str, Any]:
    """The one thing of the main pass that the reference pass shares: another pack's attention kernel."""
    name = "optimized_attention_override"
    return {name: options[name]} if name in options else {}
