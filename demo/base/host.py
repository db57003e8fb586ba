"""Makes the host's `comfy` importable for the demo's scripts, on the CPU unless CUDA is requested."""

import os
import sys
from pathlib import Path


def use_host(device: str = "cpu") -> None:
    """Make `import comfy` work, from COMFYUI_PATH or from dev.py's copy of ComfyUI.

    The host parses the command line when it is first imported, so ours is hidden during that import.
    """
    repository = Path(__file__).resolve().parents[2]
    host = Path(os.environ.get("COMFYUI_PATH") or repository / ".comfyui")
    if not (host / "comfy").is_dir():
        raise FileNotFoundError(f"No ComfyUI at {host}. Set COMFYUI_PATH to a checkout, or run dev.py once.")
    # First, because the host has a module called `nodes`, and so has this repository.
    sys.path.insert(0, str(host))
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        from comfy.cli_args import args
    finally:
        sys.argv = arguments
    args.cpu = device == "cpu"
