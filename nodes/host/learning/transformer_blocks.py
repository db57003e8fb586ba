"""Blocks of diffusion transformers while gradients flow: what they change in place, and what they keep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.lumina.model import JointTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..networks.registry import hooked
from .patched_forward import patched_forward

if TYPE_CHECKING:
    from ..host_types import Forward

IN_PLACE = (DoubleStreamBlock, SingleStreamBlock)  # they add to the very tensors that they are given
CHANGED = ("img", "txt")  # and the only one that single blocks are given by its place
BLOCKS = (JointTransformerBlock, *IN_PLACE)


@contextlib.contextmanager
def transformer_gradients(network: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Let gradients through a transformer, and through what is attended to in its calls."""
    with (
        hooked(network),
        out_of_place_blocks(network),
        checkpoint_blocks(network) if checkpointing else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def out_of_place_blocks(network: nn.Module) -> Iterator[None]:
    """Let gradients through Flux's blocks, which overwrite what the norms before have kept for the backward pass."""
    blocks = [module for module in network.modules() if isinstance(module, IN_PLACE)]
    norms = [module for block in blocks for module in block.children() if isinstance(module, nn.LayerNorm)]
    # What the first block is given comes out of a layer that autograd lets nobody change.
    with patched_forward(norms, _normed_copy), patched_forward(blocks[:1], _with_own_inputs):
        yield


@contextlib.contextmanager
def checkpoint_blocks(network: nn.Module) -> Iterator[None]:
    """Gradient checkpointing: keep the inputs of every block, and compute it once more in the backward pass.

    A block that adds to its inputs gets copies, so that the second time begins where the first one did.
    """
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    with patched_forward(blocks, _recomputed):
        yield


def _normed_copy(norm: nn.Module, original: Forward, x: Tensor) -> Tensor:
    return original(x.clone() if x.requires_grad else x)


def _with_own_inputs(block: nn.Module, original: Forward, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    return original(**{name: _copy(x) if name in CHANGED else x for name, x in kwargs.items()})


def _recomputed(block: nn.Module, original: Forward, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    if not any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())):
        return original(*args, **kwargs)  # nothing would be kept: the reference pass, and what precedes all gradients
    options = dict(kwargs.pop("transformer_options", None) or {})
    changes = isinstance(block, IN_PLACE)

    def run(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        own = [_copy(x) for x in inputs] if changes else inputs
        named = {name: _copy(x) if changes and name in CHANGED else x for name, x in kwargs.items()}
        return original(*own, **named, transformer_options=dict(options))

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
