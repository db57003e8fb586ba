"""The host in a bench's own process. Makes the pack, the tests' helpers and the demo importable."""

import atexit
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CACHE = RESULTS / "cache"  # ignored by git: smoke runs, and what can be reproduced


def full_size() -> ModuleType:
    """tests/host/full_size.py, loaded before anything else of ours is importable."""
    if "tests.host.full_size" in sys.modules:
        return sys.modules["tests.host.full_size"]
    spec = importlib.util.spec_from_file_location("tests.host.full_size", ROOT / "tests" / "host" / "full_size.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def start_host(attention: str = "host", with_pack: bool = True) -> Any:
    """A ComfyHost on a temporary base directory.

    attention: "host" lets the host choose the kernel. "pytorch" selects torch's, which is what the host chooses on
    CUDA.
    """
    base = Path(tempfile.mkdtemp(prefix="sa-inject-bench-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = {"use_pytorch_cross_attention": True} if attention == "pytorch" else {}
    host = full_size().start_host(base, CACHE / "checkpoints", **arguments)
    if with_pack:
        host.pack_nodes()
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False  # tqdm's
    return host


def use_demo() -> None:
    """Make `import demo` work."""
    from tests.conftest import import_folder

    if "demo" not in sys.modules:
        import_folder("demo", ROOT / "demo")


def demo_checkpoint() -> Path:
    """The demo's base model, from where the demo keeps it. If none is shipped, one with random weights, elsewhere."""
    use_demo()
    from demo.base.checkpoint import write_checkpoint
    from demo.base.weights import WEIGHTS

    kept = ROOT / ".demo" / "models" / "checkpoints" / "sa-inject-demo.safetensors"
    path = kept if WEIGHTS.exists() else CACHE / "demo-random.safetensors"
    if not path.exists() or (WEIGHTS.exists() and path.stat().st_mtime < WEIGHTS.stat().st_mtime):
        write_checkpoint(path)
    return path


def weights_of(geometry: str) -> str:
    shipped = (ROOT / "demo" / "base" / "weights.safetensors").exists()
    return "trained" if geometry == "demo" and shipped else "random"


def comfyui() -> Path:
    return Path(os.environ["COMFYUI_PATH"]).resolve()
