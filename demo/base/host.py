"""Puts the host's `comfy` within reach of the demo's scripts, on the CPU unless CUDA is asked for."""

import os
import sys
from pathlib import Path


def use_host(device: str = "cpu") -> None:
    """Make `import comfy` work: COMFYUI_PATH, or the copy that dev.py unpacks beside this pack.

    The host reads its own command line when first imported, so ours is hidden from it for that moment.
    """
    repository = Path(__file__).resolve().parents[2]
    host = Path(os.environ.get("COMFYUI_PATH") or repository / ".comfyui")
    if not (host / "comfy").is_dir():
        raise FileNotFoundError(f"No ComfyUI at {host}. Set COMFYUI_PATH to a checkout, or run dev.py once.")
    # First: the host owns a module called `nodes`, and so does this repository.
    sys.path.insert(0, str(host))
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        from comfy.cli_args import args
    finally:
        sys.argv = arguments
    args.cpu = device == "cpu"
