"""The LoRA is built whatever is installed beside PEFT. An unusable PEFT gives a message with advice."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sa_inject.core.lora_layer import REQUIREMENT
from tests import conftest

QUANTIZERS = [
    "aqlm",
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "eetq",
    "gptqmodel",
    "hqq",
    "neural_compressor",
    "optimum",
    "torchao",
    "transformer_engine",
]
OTHERS = ["deepspeed", "diffusers", "flash_attn", "xformers"]

SET_UP = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("outer_conftest", {conftest!r})
outer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(outer)
outer.import_folder("sa_inject", outer.ROOT)
from pathlib import Path
import torch
from sa_inject.core.adapter_file import load_adapter, save_adapter
from tests.core.tiny_adapter import random_adapter
"""

ROUND_TRIP = """
adapter = random_adapter()
save_adapter(adapter, Path("a.safetensors"), dtype=torch.float32)
loaded = load_adapter(Path("a.safetensors"))
assert loaded.info == adapter.info
before, after = adapter.lora.state_dict(), loaded.lora.state_dict()
assert len(before) == 28 and all(torch.equal(after[key], tensor) for key, tensor in before.items())
print("round", *sorted(name for name, module in sys.modules.items() if module is None and name in {others!r}))
"""


def package(folder: Path, name: str, version: str, body: str) -> None:
    """A package as it lies in site-packages."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(body)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def python(folder: Path, code: str) -> str:
    """What a new process prints that finds the packages of `folder` first."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    code = SET_UP.format(conftest=conftest.__file__) + code
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


KINDS = {
    "ancient": ["0.0.1 "],
    "broken": ["99.0 raise OSError('cannot open shared object file')", "99.0 raise ImportError('undefined symbol')"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_packages_do_not_decide_whether_lora_can_be_built(tmp_path, kind):
    others = [*QUANTIZERS, *OTHERS]
    for name, what in zip(others, itertools.cycle(KINDS[kind])):
        package(tmp_path, name, *what.split(" ", 1))
    printed = python(tmp_path, ROUND_TRIP.format(others=others))
    assert printed.split() == ["round"]  # and what was left out is not hidden from others


FAILURES = {
    "cannot import name 'HybridCache'": "from transformers import HybridCache",
    "DLL load failed": "raise OSError('DLL load failed')",
}


@pytest.mark.parametrize("reason", FAILURES)
def test_peft_that_cannot_be_imported_is_one_sentence_with_the_command(tmp_path, reason):
    package(tmp_path, "peft", "0.17.1", FAILURES[reason])
    code = "\ntry:\n    random_adapter()\nexcept ImportError as error:\n    print(error)\n"
    (said,) = python(tmp_path, code).splitlines()
    assert reason in said
    assert said.endswith(
        f'Run: "{sys.executable}" -m pip install --upgrade "{REQUIREMENT}" accelerate   Then restart ComfyUI.'
    )


def test_the_command_asks_for_what_the_pack_requires():
    assert re.findall(r"\S+", (conftest.ROOT / "requirements.txt").read_text()) == [REQUIREMENT]
