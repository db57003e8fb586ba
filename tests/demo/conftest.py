"""Fixtures of the demo's tests: artwork, untrained autoencoder and checkpoint, and the host's models.

The host is imported inside fixtures and tests, so that they are skipped if there is none. The pack too, because this
file may be loaded before the one that makes it importable.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def one_core(monkeypatch) -> Iterator[None]:
    """Long training takes all cores that it finds. That is too many for small tensors, and other tests would keep the
    setting.
    """
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def processor(tmp_path, monkeypatch) -> Iterator[Callable[[str | None], None]]:
    """`processor("avx2 amx_bf16")` for one with these instructions, `processor(None)` for one that does not say."""
    from sa_inject.demo.base import precision

    def use(flags: str | None) -> None:
        if flags is not None:
            (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
        precision.fast_type.cache_clear()

    yield use
    precision.fast_type.cache_clear()


@pytest.fixture
def in_float32(processor) -> None:
    """For what is exact in float32 only."""
    processor("avx2")


@pytest.fixture(scope="session")
def artwork() -> None:
    """The drawings in the user's cache, downloaded if necessary."""
    from sa_inject.demo.base.artwork import catalogue, drawing

    one_of_each_vendor = {item.vendor: item for item in catalogue()}.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("npm_config_fetch_retries", "0")
        try:
            for item in one_of_each_vendor:
                drawing(item)
        except (RuntimeError, OSError, subprocess.SubprocessError) as why:
            pytest.skip(f"the artwork is not in the cache and cannot be fetched: {why}")


@pytest.fixture(scope="session")
def text_encoder_weights() -> Iterator[dict[str, Tensor]]:
    """The text encoder's tensors, created once for all tests: a hundred million random numbers take seconds."""
    from sa_inject.demo.base import checkpoint, text_encoder

    tensors = text_encoder.text_encoder_state_dict()

    def remembered(seed: int = text_encoder.SEED) -> dict[str, Tensor]:
        assert seed == text_encoder.SEED
        return tensors

    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, text_encoder):
            patch.setattr(module, "text_encoder_state_dict", remembered)
        yield tensors


@pytest.fixture(scope="session")
def caption_encoder(text_encoder_weights):
    from sa_inject.demo.base.text_encoder import CaptionEncoder

    return CaptionEncoder()


@pytest.fixture(scope="session")
def random_checkpoint(text_encoder_weights, tmp_path_factory) -> Iterator[Path]:
    """The checkpoint with random weights, as made when none are shipped."""
    from sa_inject.demo.base.checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    path = folder / "checkpoints" / "demo.safetensors"
    write_checkpoint(path, weights=folder / "none.safetensors")
    yield path
    shutil.rmtree(folder, ignore_errors=True)  # pytest would keep 300 MB of each of the last three runs


@pytest.fixture(scope="session")
def loaded(random_checkpoint) -> Iterator[SimpleNamespace]:
    """`model`, `clip` and `vae` of the random checkpoint, as the host's own loader returns them."""
    from sa_inject.demo.base.host import use_host

    use_host("cuda" if torch.cuda.is_available() else "cpu")
    import comfy.model_management
    import comfy.sd

    with torch.inference_mode():
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(random_checkpoint))
    yield SimpleNamespace(model=model, clip=clip, vae=vae)
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="session")
def pool():
    """Four random latents of a picture's size for training, with captions."""
    from sa_inject.demo.base.pool import Pool

    captions = [f"a large guitar on the left, {colour} background" for colour in ("red", "blue", "green", "pink")]
    return Pool(torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half(), captions)


@pytest.fixture(scope="session")
def autoencoder_file(tmp_path_factory) -> Path:
    """An untrained autoencoder, in the file that training would write."""
    from sa_inject.demo.base.autoencoder import new_autoencoder

    path = tmp_path_factory.mktemp("autoencoder") / "autoencoder.pt"
    torch.save(new_autoencoder(seed=3).state_dict(), path)
    return path
