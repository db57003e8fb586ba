"""The lower bound for the cost of injection: multiply-adds counted from the shapes, on tensors without storage.

Counted are the UNet call, with attention to the reference's tokens in the rows that use it, and one reference pass. The
pass includes the LoRA and ends at the last injected keys and values. The speed of a device is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sa_inject.core.attention import differentiable_attention
from sa_inject.core.injection import Reference, inject
from sa_inject.core.kv import KV, BlockKey
from sa_inject.core.lora import SelfAttentionLoRA
from sa_inject.core.masks import token_mask
from sa_inject.core.reference import KVRecorder, run_reference_pass
from sa_inject.core.site import Site
from sa_inject.nodes.host.networks.unet_sites import attending

from ..scenes import RANK, TEXT_TOKENS, Scene, quarter_mask


class Shape(NamedTuple):
    """What determines the cost of a variant."""

    references: int
    masked: bool
    apply_to: str  # "positive" or "both"
    reads: str  # "once", "every step", or "whole" for every step, all rows and to the end


class Limit:
    """Counts for one geometry. Each count runs the UNet on the meta device once."""

    def __init__(self, scene: Scene) -> None:
        config = {**scene.unet_config, "dtype": torch.float32}
        self._unet = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
        self._config = config
        self._scene = scene
        self._layers = scene.description.layers
        self._blocks = [layer.key for layer in self._layers]
        self._injected: dict[tuple, int] = {}

    @cached_property
    def plain(self) -> int:
        """Multiply-adds of one step: a conditional and an unconditional row."""
        return self._count(lambda: self._call(2, {}))

    @cached_property
    def _reference(self) -> tuple[int, dict[BlockKey, tuple[int, int]]]:
        """Multiply-adds of the reference pass over one picture, and the size in tokens of every layer."""
        lora = SelfAttentionLoRA(self._layers, RANK, float(RANK), torch.Generator())
        deltas = lora.deltas(torch.device("meta"), torch.float32)

        recorder = KVRecorder(self._blocks, deltas, stop_at=self._blocks[-1])
        with attending(self._unet, {}, recorder.at, self._blocks, keeps_hidden=True) as options:
            count = self._count(lambda: run_reference_pass(lambda: self._call(1, options), recorder))
        return count, {key: (recorded.height, recorded.width) for key, recorded in recorder.bank.items()}

    def tokens(self, masked: bool) -> dict[BlockKey, int]:
        """Tokens of one picture at every layer."""
        mask = quarter_mask(self._scene.side)
        sizes = self._reference[1]
        return {key: int(token_mask(mask, h, w).sum()) if masked else h * w for key, (h, w) in sizes.items()}

    def bank_bytes(self, references: int, masked: bool, bytes_per_number: int = 2) -> int:
        """Size of the keys and values of all layers."""
        tokens = self.tokens(masked)
        numbers = sum(2 * tokens[layer.key] * layer.inner_dim for layer in self._layers)
        return references * numbers * bytes_per_number

    def injected(self, shape: Shape) -> int:
        """Multiply-adds of one step whose rows attend to the reference's tokens too."""
        key = shape[:3]  # how often the reference is read changes nothing here
        if key not in self._injected:
            tokens = {block: shape.references * count for block, count in self.tokens(shape.masked).items()}
            rows = slice(0, 2 if shape.apply_to == "both" else 1)

            def at(site: Site) -> Tensor:
                empty = site.k.new_empty(1, tokens[site.key], site.k.shape[-1])
                return inject(site, [Reference(KV(empty, empty), rows=rows)])

            with attending(self._unet, {}, at, self._blocks) as options:
                self._injected[key] = self._count(lambda: self._call(2, options))
        return self._injected[key]

    def ratio(self, shape: Shape, steps: int) -> float:
        """Multiply-adds of a run of `steps` steps, relative to plain sampling."""
        step = self.injected(shape)
        if shape.reads == "once":
            total = steps * step + shape.references * self._reference[0]
        elif shape.reads == "every step":
            total = steps * (step + shape.references * self._reference[0])
        else:
            total = steps * (step + shape.references * self.plain)  # two rows, as the main pass has
        return total / (steps * self.plain)

    def _call(self, rows: int, options: dict[str, Any]) -> Tensor:
        side, meta = self._scene.latent_side, "meta"
        wide = self._config.get("adm_in_channels")
        return self._unet(
            torch.empty(rows, self._config["in_channels"], side, side, device=meta),
            torch.empty(rows, device=meta),
            context=torch.empty(rows, TEXT_TOKENS, self._config["context_dim"], device=meta),
            y=torch.empty(rows, wide, device=meta) if wide else None,
            transformer_options={"optimized_attention_override": _attend, **options},
        )

    @staticmethod
    def _count(call: Callable[[], object]) -> int:
        counter = FlopCounterMode(display=False)
        with torch.inference_mode(), counter:
            call()
        return counter.get_total_flops() // 2


def _attend(original: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *_: Any, **__: Any) -> Tensor:
    return differentiable_attention(q, k, v, heads)
