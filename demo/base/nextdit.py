"""A tiny NextDiT for the demo: Z-Image's network in the host's own class, for the demo's latents.

Only its size differs from Z-Image. Patches are 2x2, and rotary positions have three axes. Text and picture are one
sequence, and both are padded to 32 tokens. The objective is flow matching with a shift of 3. ComfyUI's loader knows the
real network by its width, so `as_model` builds the classes that the loader would choose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .host import use_host
from .language_model import MULTIPLE, WIDTH, Texts
from .precision import fast

use_host("cuda" if torch.cuda.is_available() else "cpu")
import comfy.latent_formats  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy.ldm.lumina.model import NextDiT  # noqa: E402
from comfy.model_sampling import time_snr_shift  # noqa: E402

CONFIG: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 4,
    "dim": 256,
    "cap_feat_dim": WIDTH,
    "n_layers": 6,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": MULTIPLE,
}
SHIFT: float = comfy.supported_models.ZImage.sampling_settings["shift"]
OPEN_GATE: float = 0.3  # initial scale of residual branches, before tanh
PAD_STD: float = 0.5


def new_nextdit(seed: int) -> NextDiT:
    """The host's class with fan-in scaled weights. Its initial output is zero."""
    network = NextDiT(**CONFIG, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "adaLN" in name or name.startswith("final_layer"):
                weight.zero_()
                if name.endswith("bias") and weight.numel() == 4 * CONFIG["dim"]:
                    for gate in weight.chunk(4)[1::2]:
                        gate.fill_(OPEN_GATE)
            elif weight.ndim == 1:
                weight.fill_(1.0 if "norm" in name or name == "cap_embedder.0.weight" else 0.0)
            else:
                std = PAD_STD if name.endswith("pad_token") else weight[0].numel() ** -0.5
                weight.normal_(0, std, generator=generator)
    return network


def load_nextdit(state: Path, device: str = "cpu") -> NextDiT:
    """The averaged network of a training run."""
    network = new_nextdit(0).to(device).requires_grad_(False).eval()
    network.load_state_dict(torch.load(state / "nextdit.pt", map_location=device, weights_only=True)["average"])
    return network


def blocks(network: NextDiT) -> list[Any]:
    return [*network.context_refiner, *network.noise_refiner, *network.layers]


def as_model(network: NextDiT, device: str = "cpu") -> comfy.model_patcher.ModelPatcher:
    """A MODEL of the host that samples with this network."""
    config = comfy.supported_models.ZImage(dict(CONFIG))
    config.latent_format = comfy.latent_formats.SD15()
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "")
    base.diffusion_model.load_state_dict(network.state_dict())
    base.eval()
    offload = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(base, torch.device(device), offload)


def _attend(_, q: Tensor, k: Tensor, v: Tensor, heads: int, *__, **___) -> Tensor:
    """Attention written out, which can be compiled. q, k, v (b, heads, n, d) -> (b, n, heads*d)"""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


@contextmanager
def _filled_up(network: NextDiT, lengths: Tensor) -> Iterator[None]:
    """Pad each caption with the network's own padding vectors, so that a batch can have different lengths."""

    def fill(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
        is_own = torch.arange(embedded.shape[1], device=lengths.device) < lengths[:, None]
        return torch.where(is_own[..., None], embedded, network.cap_pad_token.to(embedded.dtype))

    handle = network.cap_embedder.register_forward_hook(fill)
    try:
        yield
    finally:
        handle.remove()


def predict_velocity(network: NextDiT, noisy: Tensor, sigma: Tensor, texts: Texts) -> Tensor:
    """The velocity from clean to noise. noisy (b, 4, h, w), sigma (b,) in 0..1 -> (b, 4, h, w) in float32"""
    options = {"optimized_attention_override": _attend}
    with fast(noisy.device.type), _filled_up(network, texts.lengths):
        return network(noisy, sigma, texts.vectors, texts.vectors.shape[1], transformer_options=options).float()


def shifted(fraction: Tensor) -> Tensor:
    """Noise levels at fractions of the schedule in 0..1."""
    return time_snr_shift(SHIFT, fraction)


@torch.inference_mode()
def sample(
    network: NextDiT, texts: Texts, empty: Texts, size: int, seed: int, *, steps: int = 20, guidance: float = 4.0
) -> Tensor:
    """Euler's method with guidance. Texts of b rows and of one row -> latent (b, 4, size, size)"""
    b = len(texts.lengths)
    schedule = shifted(torch.linspace(1, 0, steps + 1)).tolist()
    device = texts.vectors.device
    x = torch.randn(b, 4, size, size, generator=torch.Generator().manual_seed(seed)).to(device)
    both = texts.joined(empty.repeated(b))
    for sigma, following in zip(schedule, schedule[1:], strict=False):
        levels = torch.full((2 * b,), sigma, device=device)
        cond, uncond = predict_velocity(network, torch.cat([x, x]), levels, both).chunk(2)
        x = x + (uncond + guidance * (cond - uncond)) * (following - sigma)
    return x
