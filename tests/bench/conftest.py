"""Makes the benches importable, and the host's models with them."""

import os
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, import_folder
from tests.demo.conftest import artwork  # noqa: F401  # a fixture that both need

if "bench" not in sys.modules:
    import_folder("bench", ROOT / "bench")


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
