"""The base model's UNet: the host's class at SD1.5's width, one level of 16x16 latents and a middle block, 25.8 M.

With `model_channels` 320, `context_dim` 768 and convolutional projections, the host recognises it as SD1.5.
"""

import torch
from einops import rearrange
from torch import Tensor

from .host import use_host
from .precision import fast, fast_type

use_host("cuda" if torch.cuda.is_available() else "cpu")
import comfy.model_sampling  # noqa: E402
import comfy.ops  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

CONFIG: dict = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1],
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
CLOSED: tuple[str, ...] = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")  # ends of residual branches


def new_unet(seed: int, closed_std: float = 0.0) -> UNetModel:
    """The host's class with fan-in scaled weights. The last layers of residual branches are scaled by `closed_std`."""
    unet = UNetModel(**CONFIG, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            gain = closed_std if name.endswith(CLOSED) else 1.0
            weight.normal_(0, gain * weight[0].numel() ** -0.5, generator=generator)
    return unet


def sigmas() -> Tensor:
    """SD1.5's thousand noise levels, ascending, from the host. -> (1000,)"""
    return comfy.model_sampling.ModelSamplingDiscrete().sigmas


def _attend(_, q: Tensor, k: Tensor, v: Tensor, heads: int, *__, **___) -> Tensor:
    """Attention written out: at 256 tokens on a CPU it is faster than PyTorch's fused one, and it can be compiled."""
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=heads) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (b, heads, n, m)
    out = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
    return rearrange(out, "b heads n d -> b n (heads d)")


def predict_noise(unet: UNetModel, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """noisy (b, 4, h, w) of unit variance, t (b,), context (b, 77, 768) -> (b, 4, h, w) in float32"""
    with fast(noisy.device.type):
        options = {"optimized_attention_override": _attend}
        context = context.to(fast_type(noisy.device.type))
        return unet(noisy, t, context=context, transformer_options=options).float()


@torch.inference_mode()
def sample(
    unet: UNetModel, context: Tensor, empty: Tensor, size: int, seed: int, *, steps: int = 20, guidance: float = 4.0
):
    """Euler's method with guidance. context (b, 77, 768), empty (1, 77, 768) -> latent (b, 4, size, size)"""
    levels = sigmas()
    chosen = torch.linspace(999, 0, steps).round().long()
    schedule = torch.cat([levels[chosen], torch.zeros(1)]).tolist()
    b = context.shape[0]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, 4, size, size, generator=generator).to(context.device) * schedule[0]
    both = torch.cat([context, empty.expand(b, -1, -1)])
    for t, sigma, following in zip(chosen.tolist(), schedule, schedule[1:], strict=False):
        noisy = torch.cat([x, x]) / (sigma**2 + 1) ** 0.5
        cond, uncond = predict_noise(unet, noisy, torch.full((2 * b,), float(t), device=x.device), both).chunk(2)
        x = x + (uncond + guidance * (cond - uncond)) * (following - sigma)
    return x
