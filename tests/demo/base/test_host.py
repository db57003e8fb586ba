"""Finding the host."""

import os
import sys
from pathlib import Path

import pytest

from sa_inject.demo.base.host import use_host


def test_a_folder_without_comfyui_is_refused_by_name_and_stays_off_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="COMFYUI_PATH") as failure:
        use_host()
    assert str(tmp_path) in str(failure.value) and str(tmp_path) not in sys.path


@pytest.mark.comfy
def test_the_host_is_the_one_that_is_named_and_never_reads_our_arguments(monkeypatch):
    arguments = ["demo", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "path", sys.path[:])
    use_host()
    import comfy.cli_args

    assert sys.argv is arguments
    assert Path(comfy.cli_args.__file__).resolve().parents[1] == Path(os.environ["COMFYUI_PATH"]).resolve()
