"""Blocks of diffusion transformers in the backward pass: without in-place changes, and with checkpointing."""

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

IN_PLACE = (DoubleStreamBlock, SingleStreamBlock)  # they change their inputs in place
CHANGED = ("img", "txt")  # inputs that are changed; positional inputs of single blocks are, too
BLOCKS = (JointTransformerBlock, *IN_PLACE)


@contextlib.contextmanager
def transformer_gradients(network: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Make a transformer differentiable, with the attention to references."""
    with (
        hooked(network),
        out_of_place_blocks(network),
        checkpoint_blocks(network) if checkpointing else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def out_of_place_blocks(network: nn.Module) -> Iterator[None]:
    """Make Flux's blocks differentiable: they overwrite tensors that their norms store for the backward pass."""
    blocks = [module for module in network.modules() if isinstance(module, IN_PLACE)]
    norms = [module for block in blocks for module in block.children() if isinstance(module, nn.LayerNorm)]
    # Autograd forbids in-place changes of the first block's inputs.
    with patched_forward(norms, _normed_copy), patched_forward(blocks[:1], _with_own_inputs):
        yield


@contextlib.contextmanager
def checkpoint_blocks(network: nn.Module) -> Iterator[None]:
    """Gradient checkpointing (Chen et al., 2016): store the inputs of each block, and recompute the rest.

    Blocks that change their inputs in place get copies, so that the recomputation has the same inputs.
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
        return original(*args, **kwargs)  # nothing would be stored
    options = dict(kwargs.pop("transformer_options", None) or {})
    changes = isinstance(block, IN_PLACE)

    def run(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        own = [_copy(x) for x in inputs] if changes else inputs
        named = {name: _copy(x) if changes and name in CHANGED else x for name, x in kwargs.items()}
        return original(*own, **named, transformer_options=dict(options))

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
