"""Observes a sampling run: how much the references add, and where a chosen point attends to them.

It records the attention calls of every block. The first call of a block is the self-attention. The calls that follow,
up to the cross-attention, are those to the references, in the order of the Apply nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.sample
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ....core.kv import BlockKey
from ....core.masks import token_mask
from .patch import installed_injections
from .sampling_run import Injection

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..host_types import Conditioning, Latent, ModelSampling, TransformerOptions

STAGES = ("input", "middle", "output")
OVERRIDE = "optimized_attention_override"


@dataclass(eq=False)
class Maps:
    """Maps (h, w) of one noise level at the latent's size: for each stage of the UNet, the sum over its layers."""

    added: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)

    def mean(self, stage: str) -> Tensor | None:
        return self.added[stage] / self.layers[stage] if stage in self.layers else None


@dataclass(eq=False)
class Inspection:
    """A finished run. `levels` has an entry for each sigma with an active reference, the highest first."""

    latent: Tensor  # (b, c, h, w)
    levels: dict[float, Maps]
    attention_maps: list[Tensor]  # (h, w) for each reference: the chosen point's attention; the sum of all is 1
    injections: tuple[Injection, ...]


def inspect_sampling(
    model: ModelPatcher,
    positive: Conditioning,
    negative: Conditioning,
    latent: Latent,
    point: tuple[float, float],
    **sampling: Any,
) -> Inspection:
    """Sample once, and observe. point: (x, y) as shares of the picture's width and height, 0..1.

    sampling: seed, steps, cfg, sampler_name and scheduler. Raises ValueError for a model without injection, for one
    that is no UNet, and if no reference was active.
    """
    injections = installed_injections(model)
    if not injections:
        raise ValueError(
            "Inspect Self-Attention Injection: the connected model has no injection. Connect the model that comes "
            "out of Apply Self-Attention Injection."
        )
    if not isinstance(model.model.diffusion_model, UNetModel):
        raise ValueError(
            "Inspect Self-Attention Injection: the connected model is no UNet. Connect an SD1.x, SD2.x or SDXL model."
        )
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    observer = AttentionObserver(injections, model.get_model_object("model_sampling"), tuple(samples.shape[-2:]), point)
    drawn = comfy.sample.sample(
        observer.observed(model),
        comfy.sample.prepare_noise(samples, sampling["seed"], latent.get("batch_index")),
        sampling["steps"],
        sampling["cfg"],
        sampling["sampler_name"],
        sampling["scheduler"],
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        seed=sampling["seed"],
    )
    if not observer.levels:
        raise ValueError(
            "Inspect Self-Attention Injection: no reference acted in any step. Lower start_percent on the Apply node, "
            "or take more steps. The log names blocks that were left alone."
        )
    levels = dict(sorted(observer.levels.items(), reverse=True))
    return Inspection(drawn, levels, observer.shares(), injections)


class AttentionObserver:
    """Observes attention calls through ComfyUI's attention override. It changes no result."""

    def __init__(
        self,
        injections: Sequence[Injection],
        sampling: ModelSampling,
        size: tuple[int, ...],
        point: tuple[float, float],
    ) -> None:
        self.levels: dict[float, Maps] = {}
        self._injections = injections
        self._sampling = sampling
        self._size = size  # (h, w) of the latent
        self._point = point
        self._block: BlockKey | None = None
        self._own: tuple[Tensor, Tensor] | None = None  # queries and result of the block's self-attention
        self._references = 0  # number of reference calls in this block so far
        self._is_cross_attention = False
        self._attention_maps = [torch.zeros(p.latent.shape[-2:]) for i in injections for p in i.image_prompt.pictures]

    def observed(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model with this observer. An attention override of another pack stays in use."""
        clone = model.clone()
        clone.set_model_attn2_patch(self.before_cross_attention)
        options = clone.model_options["transformer_options"]
        options[OVERRIDE] = ObservedAttention(self, options.get(OVERRIDE))
        return clone

    def before_cross_attention(
        self, n: Tensor, context: Tensor, value: Tensor, extra_options: TransformerOptions
    ) -> tuple:
        self._block, self._own, self._is_cross_attention = None, None, True
        return n, context, value

    def observe(self, q: Tensor, k: Tensor, out: Tensor, heads: int, options: TransformerOptions) -> None:
        if self._is_cross_attention:
            self._is_cross_attention = False
            return
        stage, index = options["block"]
        block = BlockKey(stage, index, options["block_index"])
        if block != self._block or self._own is None:
            self._block, self._own, self._references = block, (q, out), 0
            return
        sigma = float(options["sigmas"].flatten()[0])
        acting = [i for i in self._injections if block in i.blocks and i.active_at(sigma, self._sampling)]
        grid = options["activations_shape"][-2:]
        if self._references < len(acting) and self._is_reference(acting[self._references], k, grid):
            self._add(acting[self._references], block, sigma, q, k, out, heads, grid)
        self._references += 1

    def _is_reference(self, injection: Injection, k: Tensor, grid: Sequence[int]) -> bool:
        """Whether the keys are as many as this reference's tokens, unlike those of the reference pass."""
        return k.shape[1] == sum(int(tokens.sum()) for tokens, _ in self._kept(injection, self._size[0] / grid[0]))

    @staticmethod
    def _kept(injection: Injection, scale: float) -> list[tuple[Tensor, tuple[int, ...]]]:
        """For each picture of an image prompt, which tokens (n,) of a layer are not masked out, and the layer's (h, w).

        scale: the latent's side divided by the layer's.
        """
        found = []
        for picture in injection.image_prompt.pictures:
            h, w = (math.ceil(side / scale) for side in picture.latent.shape[-2:])
            whole = torch.ones(h * w, dtype=torch.bool)
            found.append((whole if picture.mask is None else token_mask(picture.mask, h, w).flatten(), (h, w)))
        return found

    def _add(
        self,
        injection: Injection,
        block: BlockKey,
        sigma: float,
        q: Tensor,
        k: Tensor,
        out: Tensor,
        heads: int,
        grid: Sequence[int],
    ) -> None:
        assert self._own is not None
        height, width = grid
        if q.shape[1] != height * width or out.shape[1] != q.shape[1]:
            return  # merged or tiled tokens have no known position
        own = self._own[1].float().norm(dim=-1).mean(0)  # (n,)
        added = out.float().norm(dim=-1).mean(0) * injection.strength
        share = self._resized(rearrange(added / (own + 1e-6), "(h w) -> h w", h=height), self._size)
        if injection.attn_mask is not None:
            share = share * self._resized(injection.attn_mask.float(), self._size)
        maps = self.levels.setdefault(sigma, Maps())
        maps.added[block.stage] = maps.added.get(block.stage, torch.zeros(self._size)) + share
        maps.layers[block.stage] = maps.layers.get(block.stage, 0) + 1
        x, y = (min(int(share * side), side - 1) for share, side in zip(self._point, (width, height), strict=True))
        self._add_attention(injection, q[:, y * width + x], k, heads, self._size[0] / height)

    def _add_attention(self, injection: Injection, q: Tensor, k: Tensor, heads: int, scale: float) -> None:
        """Add the chosen point's attention to the pictures of an image prompt. q (b, c), k (b, m, c)"""
        queries, keys = (
            rearrange(q.float(), "b (h d) -> b h d", h=heads),
            rearrange(k.float(), "b m (h d) -> b h m d", h=heads),
        )
        attention = torch.einsum("bhd,bhmd->bhm", queries, keys) / math.sqrt(queries.shape[-1])
        spread = attention.softmax(-1).mean((0, 1)).cpu()  # (m,)
        first = sum(len(i.image_prompt.pictures) for i in self._injections[: self._injections.index(injection)])
        for index, (tokens, grid) in enumerate(self._kept(injection, scale)):
            whole = torch.zeros(len(tokens))
            whole[tokens] = spread[: int(tokens.sum())]
            spread = spread[int(tokens.sum()) :]
            seen = self._attention_maps[first + index]
            seen += self._resized(whole.view(grid), seen.shape) * len(whole) / seen.numel()

    def shares(self) -> list[Tensor]:
        total = sum(float(seen.sum()) for seen in self._attention_maps)
        return [seen / total if total else seen for seen in self._attention_maps]

    @staticmethod
    def _resized(values: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(values[None, None].float().cpu(), tuple(size), mode="bilinear", align_corners=False)[0, 0]


class ObservedAttention:
    """An attention override that calls the earlier override or the host's function, and observes the result."""

    def __init__(self, observer: AttentionObserver, earlier: Callable[..., Tensor] | None) -> None:
        self._observer = observer
        self._wrapped = earlier

    def __call__(self, func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs):
        compute = func if self._wrapped is None else self._around_wrapped(func)
        out = compute(q, k, v, heads, *args, **kwargs)
        options = kwargs.get("transformer_options")
        if options and "block" in options and "activations_shape" in options and options.get("sigmas") is not None:
            self._observer.observe(q, k, out, heads, options)
        return out

    def _around_wrapped(self, func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        earlier = self._wrapped
        assert earlier is not None
        return lambda *args, **kwargs: earlier(func, *args, **kwargs)
