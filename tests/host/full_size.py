"""Models of the real sizes with random weights, made in the host's own classes without a checkpoint file.

As a script it starts the host in one VRAM mode, trains and draws once, and prints seconds and memory as JSON:

    python tests/host/full_size.py --vram low --geometry sd15 --side 512 --steps 20 --dtype bfloat16
"""

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
VRAM_MODES = ("normal", "low", "high", "no")

# The last layer of every residual branch. They start small, so that a deep random UNet stays finite in float16.
BRANCH_ENDS = ("out_layers.3.weight", "proj_out.weight", "to_out.0.weight", "ff.net.2.weight")
BRANCH_GAIN = 0.3


@dataclass(frozen=True)
class Geometry:
    """A UNet's sizes as the host detects them, and the tiny checkpoint whose CLIP and VAE are used."""

    config: str  # the class in comfy.supported_models
    checkpoint: str
    side: int  # side in pixels that it was made for
    unet: dict[str, Any]
    text_layers: int | None = None  # of each text encoder; None: all


COMMON = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "model_channels": 320,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SD15 = Geometry(
    config="SD15",
    checkpoint="sd15",
    side=512,
    unet={
        **COMMON,
        "adm_in_channels": None,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "use_linear_in_transformer": False,
        "context_dim": 768,
        "num_heads": 8,
    },
)
SDXL = Geometry(
    config="SDXL",
    checkpoint="sdxl",
    side=1024,
    unet={
        **COMMON,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "num_head_channels": 64,
    },
)


def narrow(geometry: Geometry, channels: int = 64, side: int = 128) -> Geometry:
    """The same layers at a fraction of the width, for a machine without a GPU."""
    unet = {**geometry.unet, "model_channels": channels}
    return replace(geometry, side=side, unet=unet, text_layers=3)


GEOMETRIES = {"sd15": SD15, "sdxl": SDXL, "narrow": narrow(SD15), "narrow-xl": narrow(SDXL)}


def random_model(geometry: Geometry, dtype: torch.dtype, seed: int = 0) -> Any:
    """A ModelPatcher with inference tensors on its offload device, as from the stock loader."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models

    device, offload = management.get_torch_device(), management.unet_offload_device()
    config = getattr(comfy.supported_models, geometry.config)(geometry.unet)
    cast = management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    with torch.inference_mode():
        base = config.get_model({}, "", device=offload)
        fill(base.diffusion_model, device, seed)
        base.to(offload)
    return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=offload)


def fill(unet: torch.nn.Module, device: torch.device, seed: int) -> None:
    """Weights that keep the variance, norms without effect, no bias. Drawn on `device`, which is fastest."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        gain = BRANCH_GAIN if name.endswith(BRANCH_ENDS) else 1.0
        bound = gain * (3 / parameter[0].numel()) ** 0.5
        drawn = torch.empty_like(parameter, device=device).uniform_(-bound, bound, generator=generator)
        parameter.copy_(drawn)


def random_pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """ComfyUI's IMAGE (count, side, side, 3) in 0..1"""
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(seed))


def train_and_draw(
    host: Any, geometry: Geometry, dtype: torch.dtype, side: int, steps: int, sampling_steps: int
) -> dict[str, Any]:
    """Train an adapter through our node and draw one picture with it through the stock sampler."""
    import comfy.model_management as management

    host.pack_nodes()
    _, clip, vae = host.load_checkpoint(geometry.checkpoint, text_layers=geometry.text_layers)
    model = random_model(geometry, dtype)
    pictures = random_pictures(3, side)
    report: dict[str, Any] = {"device": str(model.load_device), "vram_state": management.vram_state.name}

    forget_peak()
    adapter, patched_clip, losses, *_ = host.execute(
        "TrainSAInjectAdapter",
        model=model,
        clip=clip,
        vae=vae,
        images=pictures,
        resolution=side,
        steps=steps,
        previews=0,
        sample_every=0,
        file_name="full-size",
    )
    report |= {"losses": losses["loss"], "training_peak_gb": peak_gb()}

    forget_peak()
    (prompt,) = host.execute("EncodeImagePrompt", images=pictures[:1], vae=vae, resolution=side)
    (patched,) = host.execute("ApplySelfAttnInjection", model=model, adapter=adapter, image_prompt=prompt)
    positive, negative = (
        host.execute("CLIPTextEncode", clip=patched_clip, text=text)[0] for text in ("a photo of sainj toy", "")
    )
    (samples,) = host.execute(
        "KSampler",
        model=patched,
        positive=positive,
        negative=negative,
        latent_image={"samples": torch.zeros(1, 4, side // 8, side // 8)},
        steps=sampling_steps,
        seed=1,
    )
    (image,) = host.execute("VAEDecode", samples=samples, vae=vae)
    return report | {
        "image_shape": list(image.shape),
        "image_is_finite": bool(image.isfinite().all() and samples["samples"].isfinite().all()),
        "sampling_peak_gb": peak_gb(),
    }


def forget_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """The maximum that CUDA's allocator held since `forget_peak`. None without CUDA."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if torch.cuda.is_available() else None


def import_packages() -> None:
    """Make `sa_inject` and `tests` importable as they are in tests, with none of our folders on the path."""
    spec = importlib.util.spec_from_file_location("sa_inject_conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    conftest.leave_sys_path()
    conftest.import_folder("sa_inject", ROOT)
    conftest.import_folder("tests", ROOT / "tests")


def start_host(base: Path, cache: Path, **arguments: Any) -> Any:
    """The host in this process on the base directory `base`. Tiny checkpoints are kept in `cache`.

    arguments: of its command line, as in lowvram=True.
    """
    import_packages()
    comfyui = Path(os.environ["COMFYUI_PATH"]).resolve()
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    for name, value in arguments.items():
        setattr(args, name, value)
    from tests.host.in_process import ComfyHost

    return ComfyHost(comfyui, base, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram", choices=VRAM_MODES, default="normal")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="sd15")
    parser.add_argument("--side", type=int, help="pixels; what the model was made for by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    geometry = GEOMETRIES[options.geometry]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        # normal is the host's mode without an argument
        arguments = {} if options.vram == "normal" else {f"{options.vram}vram": True}
        host = start_host(Path(base), Path(base) / "cache", **arguments)
        report = train_and_draw(
            host,
            geometry,
            getattr(torch, options.dtype),
            options.side or geometry.side,
            options.steps,
            options.sampling_steps,
        )
    print(json.dumps({"vram": options.vram, **report}))


if __name__ == "__main__":
    main()
