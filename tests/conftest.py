"""Makes the pack importable as `sa_inject` and the helpers as `tests`, and keeps both folders off `sys.path`.

ComfyUI has a top-level module called `nodes`, and the pack has a folder of that name. If the repository root or
`tests/` were on the path, the host would import the wrong one.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin: far faster on a busy machine

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LONGEST = ("test_demo_adapter.py", "test_bench_learning.py")  # begun first, so that no process is left waiting for one


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "comfy: needs a ComfyUI checkout, named by COMFYUI_PATH")
    config.addinivalue_line("markers", "gpu: needs CUDA")
    config.option.importmode = "importlib"  # the only mode that leaves sys.path alone
    config.pluginmanager.register(RootIsNoTestPackage())
    leave_sys_path()
    if "sa_inject" not in sys.modules:
        import_folder("sa_inject", ROOT)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS / "host" in item.path.parents:
            item.add_marker("comfy")
    items.sort(key=lambda item: item.path.name not in LONGEST)
    reasons = {"comfy": why_no_host(), "gpu": why_no_cuda(items)}
    for name, reason in reasons.items():
        for item in items:
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


class RootIsNoTestPackage:
    """The root has an `__init__.py` for ComfyUI. Pytest would take the whole pack for a package of tests and import it
    under a second name.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def leave_sys_path() -> None:
    """`python -m pytest`, a `pythonpath` setting, and conftest files that are loaded before us put our folders on the
    path.
    """
    ours = {ROOT, TESTS, *(folder for folder in TESTS.rglob("*") if folder.is_dir())}
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() not in ours]


def import_folder(name: str, folder: Path) -> None:
    """Import `folder` as the package `name`. Without an `__init__.py` it is an empty package."""
    init = folder / "__init__.py"
    if init.exists():
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    else:
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if init.exists():
        assert spec.loader is not None
        spec.loader.exec_module(module)


def why_no_host() -> str | None:
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        return "COMFYUI_PATH is not set: it names the ComfyUI checkout to test against"
    if not (Path(path) / "main.py").exists():
        return f"COMFYUI_PATH is {path}, which holds no ComfyUI (no main.py)"
    return None


def why_no_cuda(items: list[pytest.Item]) -> str | None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return None  # asking would import torch
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


@pytest.fixture(scope="session", autouse=True)
def host_base(tmp_path_factory) -> Path | None:
    """The folder of the host's files. It is set before any test imports a module that reads it. None without a host."""
    if why_no_host():
        return None
    base = tmp_path_factory.mktemp("in-process")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.environ["COMFYUI_PATH"])
        from comfy.cli_args import args
    args.base_directory = str(base)
    return base


import_folder("tests", TESTS)  # at once: the conftest files of the folders below are loaded before pytest_configure
