"""Makes the benches importable by their plain names, as they import each other, and the host's models with them."""

import os
import sys
from pathlib import Path

import pytest

from tests.demo.conftest import artwork  # noqa: F401  # a fixture that both need

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))  # last, so that it hides nobody's modules


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The host's folder, its models importable: of its server, and where it keeps files, nothing is decided here."""
    path = Path(os.environ["COMFYUI_PATH"]).resolve()
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    return path
