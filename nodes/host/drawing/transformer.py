"""The injection in diffusion transformers: the wrapper around every call, and its reference pass.

A call has other arguments than a UNet's, and text and picture are one sequence. Attention functions of other packs are
called inside ours, so no block has to be skipped.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....core.kv import BlockKey, KVBank
from ....core.site import AtSite
from ..networks.registry import attending, is_transformer, text_width
from ..networks.transformers import TransformerInputs
from ..networks.unet import compute_dtype
from .foreign import ForeignCode
from .injected import InjectedCall, Source
from .patch import SelfAttentionInjection
from .reference_call import PRIVATE, explain_errors
from .reference_pass import encode_references
from .row_texts import COND
from .sampling_run import RUN_KEY, Injection, SamplingRun, sigma_of

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import WrapperExecutor

    from ..host_types import Arguments, TransformerOptions

log = logging.getLogger(__name__)

NOTHING_FOREIGN = ForeignCode(frozenset(), (), frozenset())
OPTIONS = "transformer_options"


class TransformerInjection(SelfAttentionInjection):
    """The wrapper around every call of a transformer, and two more around the sampling run."""

    def prepare_sampling_wrapper(
        self, executor: WrapperExecutor, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any
    ) -> tuple:
        """Reserve memory for the references as rows of the batch, and for their keys and values."""
        one = self.base.memory_required([1, *noise_shape[1:]])
        rows = -(-sum(bank_bytes(injection, self.base) for injection in self.injections) // max(1, int(one)))
        noise_shape = [noise_shape[0] + rows, *noise_shape[1:]]
        return super().prepare_sampling_wrapper(executor, model, noise_shape, *args, **kwargs)

    # A compiled network would ignore the hooks of a call. So it runs uncompiled while it is injected.
    @torch.compiler.disable
    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
        call = NetworkCall.of(executor.original, args, kwargs)
        run = call.options.get(RUN_KEY) or SamplingRun()
        network, x = executor.class_obj, call.x
        sigma = sigma_of(call.options) if any(injection.needs_sigma for injection in self.injections) else None
        seen = self._rows(run, executor, call.row_arguments(), call.options)
        seen = [(i, rows) for i, rows in seen if run.is_active(i, sigma, self.base.model_sampling)]
        if not seen or not self._is_supported_call(run, network, call):
            return executor(*args, **kwargs)
        self._warn_if_compiled(run)
        with uncompiled():
            sources = []
            for injection, rows in seen:
                bank = self._transformer_bank(run, injection, network, sigma, call)
                sources.append(Source(injection, rows, bank, run.deltas_of(injection.adapter, x)))
            injected = InjectedCall(sources, run, [])
            with attending(network, call.options, injected.at, injected.blocks, size=call.size) as options:
                args, kwargs = call.with_options(options)
                return executor(*args, **kwargs)

    def _is_supported_call(self, run: SamplingRun, network: nn.Module, call: NetworkCall) -> bool:
        if is_transformer(network) and call.context.shape[-1] == text_width(self.base):
            return True
        run.record_skip("they go to another network than the one that the adapter was made for")
        return False

    def _transformer_bank(
        self, run: SamplingRun, injection: Injection, network: nn.Module, sigma: float | None, call: NetworkCall
    ) -> KVBank:
        """The bank for this call: from the cache, or encoded now."""
        key = run.bank_key(injection, network, self.base, sigma, call.x)
        if key not in run.banks:
            run.banks[key] = encode_references(
                TransformerReferencePass(network, call.function, call.x, call.options),
                self.base,
                injection.adapter,
                injection.image_prompt,
                sigma=sigma if injection.is_noised else None,
                noise_seed=run.seed,
                blocks=injection.blocks,
                deltas=run.deltas_of(injection.adapter, call.x),
            )
        return run.banks[key]

    def _warn_if_compiled(self, run: SamplingRun) -> None:
        if run.has_warned_of_compilation:
            return
        run.has_warned_of_compilation = True
        if any("_orig_mod" in module._modules for module in self.base.diffusion_model.modules()):
            log.warning(
                "SA-Inject: torch.compile cannot compile this model together with an image prompt. It runs uncompiled "
                "in the steps that use one."
            )


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled parts of the network run as they are: the compiler cannot follow what a site asks of a block.

    Torch has this since 2.6. Without it, blocks that a node has compiled one by one may raise.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One call of a transformer by the sampler. Its arguments may be positional or named."""

    function: Callable[..., Tensor]
    names: tuple[str, ...]  # of the positional arguments
    args: tuple[Any, ...]
    kwargs: Arguments

    @classmethod
    def of(cls, function: Callable[..., Tensor], args: Sequence[Any], kwargs: Arguments) -> NetworkCall:
        names = tuple(inspect.signature(function).parameters)[: len(args)]
        return cls(function, names, tuple(args), kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.args[self.names.index(name)] if name in self.names else self.kwargs.get(name)

    @property
    def x(self) -> Tensor:
        return self.args[0]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        height, width = self.x.shape[-2:]
        return height, width

    @property
    def context(self) -> Tensor:
        return self["context"]

    @property
    def options(self) -> TransformerOptions:
        return self[OPTIONS] or {}

    def row_arguments(self) -> list[Any]:
        """The arguments that tell which prompt a row belongs to: x, timestep, context and pooled text."""
        return [self.x, self.args[1], self.context, self["y"]]

    def with_options(self, options: TransformerOptions) -> tuple[tuple[Any, ...], Arguments]:
        if OPTIONS not in self.names:
            return self.args, {**self.kwargs, OPTIONS: options}
        index = self.names.index(OPTIONS)
        return (*self.args[:index], options, *self.args[index + 1 :]), self.kwargs


@dataclass(frozen=True, eq=False)
class TransformerReferencePass:
    """The reference pass of a transformer, with the options of the sampler's call."""

    network: nn.Module
    function: Callable[..., Tensor]
    x: Tensor
    options: TransformerOptions
    foreign: ForeignCode = NOTHING_FOREIGN
    rows: None = None  # the reference pass may have any number of rows

    def read(self, inputs: TransformerInputs, at: AtSite, blocks: Collection[BlockKey]) -> None:
        """Call the network for a reference pass, in which `at` computes the attention of these blocks."""
        height, width = inputs.x.shape[-2:]
        options = {name: value for name, value in self.options.items() if name not in PRIVATE}
        options["cond_or_uncond"] = [COND]
        options.pop("uuids", None)
        if isinstance(options.get("sigmas"), Tensor):
            options["sigmas"] = options["sigmas"].flatten()[:1].expand(len(inputs.x))
        with (
            explain_errors(self.foreign),
            attending(self.network, options, at, blocks, size=(height, width), keeps_hidden=True) as options,
        ):
            self.function(inputs.x, inputs.timestep, **inputs.conditions, transformer_options=options)


def bank_bytes(injection: Injection, base: BaseModel) -> int:
    """Bytes of an image prompt's bank: keys at full width, values at the LoRA's rank."""
    patch = getattr(base.diffusion_model, "patch_size", 1)
    tokens = sum(
        -(-picture.latent.shape[-2] // patch) * -(-picture.latent.shape[-1] // patch)
        for picture in injection.image_prompt.pictures
    )
    info = injection.adapter.info
    numbers = sum(layer.inner_dim + info.rank for layer in info.layers if layer.key in injection.blocks)
    return tokens * numbers * compute_dtype(base).itemsize
