"""Training-free reference attention as in other packs, for comparison.

Implemented from the description of the method. At every step, the same UNet without an adapter is called on the noised
reference, for every row of the batch and all layers. Each self-attention of the main call then attends to the keys and
values of the same layer beside its own, in all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor


def with_reference_every_step(model: Any, latents: list[Tensor], blocks: list[tuple], seed: int = 0) -> Any:
    """A clone that is called on the latents (1, c, h, w) at every UNet call."""
    patched = model.clone()
    wrapper = ReferenceEveryStep(model.model, latents, blocks, seed)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "bench_reference_every_step", wrapper)
    return patched


class ReferenceEveryStep:
    def __init__(self, base: Any, latents: list[Tensor], blocks: list[tuple], seed: int) -> None:
        self._base = base
        self._latents = latents
        self._blocks = blocks
        self._seed = seed

    def __deepcopy__(self, memo: dict) -> ReferenceEveryStep:
        return self  # a later clone would copy the latents

    def __call__(self, executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, **kwargs: Any):
        y, control, options = (*args, None, None, None)[:3]
        options = kwargs.pop("transformer_options", options) or {}
        sigma = options["sigmas"].flatten()[:1].to(x.device)
        bank: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for latent in self._latents:
            noised = self._noised(latent, sigma, x)
            write = {"patches_replace": {"attn1": dict.fromkeys(self._blocks, _Write(bank))}}
            executor.original(noised, timestep, context, y, None, write)
        replaced = options.get("patches_replace", {})
        options = {**options, "patches_replace": {**replaced, "attn1": dict.fromkeys(self._blocks, _Read(bank))}}
        return executor(x, timestep, context, y, control, options, **kwargs)

    def _noised(self, latent: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
        """(1, c, h, w) -> (b, c, h, w) with this step's noise, scaled as the UNet's input"""
        sampling = self._base.model_sampling
        latent = self._base.process_latent_in(latent.to(x.device, torch.float32))
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(self._seed)).to(latent)
        scaled = sampling.calculate_input(sigma, sampling.noise_scaling(sigma.view(-1, 1, 1, 1), noise, latent))
        return scaled.to(x.dtype).expand(x.shape[0], -1, -1, -1)


class _Write:
    def __init__(self, bank: dict) -> None:
        self._bank = bank

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        self._bank.setdefault((*options["block"], options["block_index"]), []).append((k, v))
        return optimized_attention(q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"))


class _Read:
    def __init__(self, bank: dict) -> None:
        self._bank = bank

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        found = self._bank[(*options["block"], options["block_index"])]
        k = torch.cat([k, *(reference_k for reference_k, _ in found)], dim=1)  # (b, n+m, heads*d)
        v = torch.cat([v, *(reference_v for _, reference_v in found)], dim=1)  # (b, n+m, heads*d)
        return optimized_attention(q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"))
