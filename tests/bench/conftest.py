"""Makes the benches and the host's models importable."""

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
    """The host's folder, with its models importable. Its server and its folders for files are not set up."""
    path = Path(os.environ["COMFYUI_PATH"]).resolve()
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    return path
