"""LoRA on the key and value projections of the self-attention layers, stored with PEFT.

PEFT never sees the live network. Its layers wrap empty Linear layers on the `meta` device, in a module tree with the
paths and sizes of the network's projections. The reference pass adds the low-rank products to the frozen projections.
So no weight of the model is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kv import BlockKey
from .layers import SelfAttentionLayer
from .lora_layer import ADAPTER_NAME, lora_linear

KEY_PREFIX = "base_model.model."  # PEFT's prefix in the files it writes


class LoRADelta(NamedTuple):
    """One low-rank product: a (r, in), b (out, r). The factor alpha/r is part of b."""

    a: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        return self.widen(self.narrow(x))

    def narrow(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., r)"""
        return F.linear(x, self.a)

    def widen(self, x: Tensor) -> Tensor:
        """x (..., r) -> (..., out)"""
        return F.linear(x, self.b)


LoRADeltas = dict[tuple[BlockKey, str], LoRADelta]


class SelfAttentionLoRA:
    """LoRA for all self-attention layers of one network. A fresh one has no effect, because `lora_B` is zero."""

    projections: tuple[str, ...] = ("to_k", "to_v")  # the layer's own output is not adapted

    def __init__(
        self, layers: Sequence[SelfAttentionLayer], rank: int, alpha: float, generator: torch.Generator | None = None
    ) -> None:
        """Create float32 parameters on the CPU. `lora_A` is drawn from `generator`, with PEFT's distribution."""
        self.layers = tuple(layers)
        self.rank = rank
        self.alpha = alpha
        self._addresses = {
            f"{layer.path}.{projection}": (layer.key, projection) for layer in layers for projection in self.projections
        }
        # PEFT may draw initial values, which are replaced below
        with cast(Any, torch.random).fork_rng(devices=[]):
            self.skeleton = _build_meta_projections(layers, self._addresses, rank, alpha)
        for path in self._addresses:
            a, b = self._linears(path)
            a.to_empty(device="cpu")
            b.to_empty(device="cpu")
            bound = 1 / math.sqrt(a.in_features)  # Kaiming uniform with a = sqrt(5)
            with torch.no_grad():
                a.weight.uniform_(-bound, bound, generator=generator)
                b.weight.zero_()

    def deltas(self, device: torch.device, dtype: torch.dtype) -> LoRADeltas:
        """Cast the products to `device` and `dtype`. Gradients reach the float32 parameters."""
        return {
            address: LoRADelta(a.weight.to(device, dtype), b.weight.to(device, dtype) * self._scaling(path))
            for path, address in self._addresses.items()
            for a, b in (self._linears(path),)
        }

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainables under the keys that PEFT uses in files."""
        for path in self._addresses:
            a, b = self._linears(path)
            yield f"{KEY_PREFIX}{path}.lora_A.weight", cast(nn.Parameter, a.weight)
            yield f"{KEY_PREFIX}{path}.lora_B.weight", cast(nn.Parameter, b.weight)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy values by key. Keys and shapes must be exactly those of `state_dict`."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[name])

    def to(self, device: torch.device) -> SelfAttentionLoRA:
        """Move the trainables. The other layers are on `meta` and have no storage."""
        for path in self._addresses:
            for linear in self._linears(path):
                linear.to(device)
        return self

    def _linears(self, path: str) -> tuple[nn.Linear, nn.Linear]:
        layer: Any = self.skeleton.get_submodule(path)
        return layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]

    def _scaling(self, path: str) -> float:
        layer: Any = self.skeleton.get_submodule(path)
        return layer.scaling[ADAPTER_NAME]


def parameter_shapes(layers: Sequence[SelfAttentionLayer], rank: int) -> dict[str, tuple[int, int]]:
    """Keys and shapes of the state dict of a LoRA for these layers."""
    return {
        f"{KEY_PREFIX}{layer.path}.{projection}.lora_{matrix}.weight": shape
        for layer in layers
        for projection in SelfAttentionLoRA.projections
        for matrix, shape in (("A", (rank, layer.query_dim)), ("B", (layer.inner_dim, rank)))
    }


def _build_meta_projections(
    layers: Sequence[SelfAttentionLayer], addresses: dict[str, tuple[BlockKey, str]], rank: int, alpha: float
) -> nn.Module:
    sizes = {layer.key: layer for layer in layers}
    root = nn.Module()
    for path, (key, _) in addresses.items():
        layer = sizes[key]
        base = nn.Linear(layer.query_dim, layer.inner_dim, bias=False, device="meta")
        _add_submodule(root, path, lora_linear(base, rank, alpha))
    return root


def _add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in dict(root.named_children()):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)
