"""Code of other packs in the UNet: foreign modules, and replaced `forward` methods of the host's modules.

Such code may depend on the number of rows, or keep data for the sampler's call. The reference pass takes care of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ....core.kv import BlockKey
from ....core.layers import SelfAttentionLayer

HOST = ("comfy.", "comfy_extras.", "torch.")
WEIGHTS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)  # other classes in quantized models
PROJECTIONS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True, eq=False)
class ForeignCode:
    modules: frozenset[str]  # class names of foreign modules: they may depend on the number of rows
    forwards: tuple[nn.Module, ...]  # modules with a replaced `forward` attribute
    attention: frozenset[BlockKey]  # self-attention layers without the host's projections

    def __bool__(self) -> bool:
        return bool(self.modules or self.forwards or self.attention)

    @contextmanager
    def without_foreign_forwards(self) -> Iterator[None]:
        """Remove replaced `forward` attributes inside this context. BrushNet's, for example, hold data for one call."""
        kept = [(module, vars(module).pop("forward")) for module in self.forwards if "forward" in vars(module)]
        try:
            yield
        finally:
            for module, forward in kept:
                vars(module)["forward"] = forward


def foreign_code(unet: nn.Module, layers: Sequence[SelfAttentionLayer]) -> ForeignCode | None:
    """The foreign code in a network with these self-attention layers. None if it is another network."""
    widths = {layer: _width(unet, layer) for layer in layers}
    found = {layer: width for layer, width in widths.items() if width is not None}
    if not found or any(width != (layer.query_dim,) for layer, width in found.items()):
        return None
    modules = list(unet.modules())
    return ForeignCode(
        modules=frozenset(type(module).__name__ for module in modules if _is_foreign(module)),
        forwards=tuple(module for module in modules if _has_foreign_forward(module)),
        attention=frozenset(layer.key for layer in layers if not _projects(unet, layer)),
    )


def _width(unet: nn.Module, layer: SelfAttentionLayer) -> tuple[int, ...] | None:
    """The shape of the norm before the attention, which stays in place if the attention is replaced."""
    norm = _submodule(unet, layer.path.removesuffix("attn1") + "norm1")
    return getattr(norm, "normalized_shape", None)


def _is_foreign(module: nn.Module) -> bool:
    if isinstance(module, WEIGHTS):
        return False
    kind = type(module)
    return not _is_of_host(kind.__module__) or not _is_of_host(getattr(kind.forward, "__module__", ""))


def _has_foreign_forward(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return forward is not None and not _is_of_host(getattr(forward, "__module__", None) or "")


def _is_of_host(name: str) -> bool:
    return name.startswith(HOST)


def _projects(unet: nn.Module, layer: SelfAttentionLayer) -> bool:
    attention = _submodule(unet, layer.path)
    return all(hasattr(attention, name) for name in PROJECTIONS)


def _submodule(unet: nn.Module, path: str) -> nn.Module | None:
    try:
        return unet.get_submodule(path)
    except AttributeError:
        return None
