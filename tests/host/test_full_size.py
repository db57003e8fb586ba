"""Models of the real sizes: training and drawing on CUDA in the host's VRAM modes, and the same code small on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.host import full_size

SCRIPT = Path(full_size.__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("vram", ["normal", "low", "high"])
def test_full_size_sd15_trains_and_draws_in_bf16(vram, capsys):
    """In a process of its own, because the host reads its VRAM mode once."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--vram", vram], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["device"].startswith("cuda")
    assert len(report["losses"]) == 20
    assert report["image_shape"] == [1, 512, 512, 3] and report["image_is_finite"]
    with capsys.disabled():
        train, draw = report["training_peak_gb"], report["sampling_peak_gb"]
        print(f"\n{vram} VRAM ({report['vram_state']}): peak {train:.2f} GB training, {draw:.2f} GB sampling")


def test_the_same_code_runs_on_a_narrow_model(comfy_host):
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    report = full_size.train_and_draw(comfy_host, full_size.GEOMETRIES["narrow"], dtype, 64, steps=2, sampling_steps=2)
    assert len(report["losses"]) == 2
    assert report["image_shape"] == [1, 64, 64, 3] and report["image_is_finite"]


@pytest.mark.parametrize("name, parameters, layers", [("sd15", 859_520_964, 16), ("sdxl", 2_567_463_684, 70)])
def test_geometry_has_the_real_size(comfy_host, pack_nodes, name, parameters, layers):
    import comfy.ops
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from sa_inject.core.layers import self_attention_layers  # pyright: ignore[reportMissingImports]

    geometry = full_size.GEOMETRIES[name]
    config = getattr(comfy.supported_models, geometry.config)(geometry.unet).unet_config
    unet = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(self_attention_layers(unet)) == layers
