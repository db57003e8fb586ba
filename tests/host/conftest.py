"""Fixtures of the tests on the real host: `comfy_host` in this process, `server` in one of its own."""

import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import import_folder
from tests.host.trainings import Checkpoint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def comfyui() -> Path:
    return Path(os.environ["COMFYUI_PATH"]).resolve()


@pytest.fixture(scope="session")
def checkpoint_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that keeps the tiny checkpoints after the session."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("sa-inject") if cache else tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def comfy_host(comfyui, checkpoint_cache, host_base):
    from tests.host.in_process import ComfyHost

    host = ComfyHost(comfyui, host_base, checkpoint_cache)
    gc.freeze()  # what is imported stays: so the collection after each test has far less to look at
    return host


@pytest.fixture(scope="session")
def load_checkpoint(comfy_host):
    """`model, clip, vae = load_checkpoint("sd15")`, see `ComfyHost.load_checkpoint`."""
    return comfy_host.load_checkpoint


@pytest.fixture(scope="module")
def sd15(load_checkpoint) -> Checkpoint:
    """SD1.5's model, CLIP and VAE, shared by the tests of one file."""
    return Checkpoint(*load_checkpoint("sd15"))


@pytest.fixture(scope="module")
def sd15_clip(sd15):
    return sd15.clip


@pytest.fixture(scope="session")
def model(comfy_host):
    """SD1.5's model, shared by the tests of all files, which do not change it."""
    from tests.host.adapters import base_model

    return base_model(comfy_host, "sd15")


@pytest.fixture(scope="module")
def own_model(comfy_host):
    """A model that no other file uses, for unusual ways to load it."""
    return comfy_host.load_checkpoint("sd15")[0]


@pytest.fixture(scope="module")
def folder(comfy_host, pack_nodes) -> Path:
    """models/sa_inject of the host in this process."""
    found = comfy_host.base / "models/sa_inject"
    found.mkdir(exist_ok=True)
    return found


@pytest.fixture
def log(caplog) -> Callable[[], list[str]]:
    """The lines of the log that name SA-Inject."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if "SA-Inject" in record.getMessage()]


@pytest.fixture(scope="session")
def pack_nodes(comfy_host) -> dict[str, type]:
    """Our nodes by their id."""
    return comfy_host.pack_nodes()


@pytest.fixture(scope="session")
def start_server(comfyui, checkpoint_cache, tmp_path_factory):
    """`with start_server("--lowvram") as server:` for a server with other arguments than `server` has."""
    from tests.host.server_process import ServerProcess
    from tests.host.tiny_checkpoints import KINDS, tiny_checkpoint

    def start(*arguments: str) -> ServerProcess:
        base = tmp_path_factory.mktemp("server")
        checkpoints = base / "models" / "checkpoints"
        checkpoints.mkdir(parents=True)
        for kind in KINDS:
            shutil.copy(tiny_checkpoint(kind, checkpoint_cache), checkpoints)
        packs = {"sa-inject": ROOT, "probe-nodes": HERE / "probe_nodes", "probe-runs": HERE / "probe_runs"}
        return ServerProcess(comfyui, base, packs, arguments)

    return start


@pytest.fixture(scope="session")
def server(start_server):
    """The server with our pack, `probe_nodes` and every tiny checkpoint (sd15.ckpt, ...), shared by the session."""
    with start_server() as process:
        yield process


@pytest.fixture(scope="session")
def newest_server(start_server, checkpoint_cache):
    """The same host with the newest frontend."""
    from tests.host.browser import NEWEST_FRONTEND, newest_frontend

    static = newest_frontend(checkpoint_cache)
    if static is None:
        pytest.skip(f"frontend {NEWEST_FRONTEND} could not be fetched")
    with start_server("--front-end-root", str(static)) as process:
        yield process


@pytest.fixture(scope="module")
def chromium():
    """A browser. It ends with the module, because its event loop would disturb other tests."""
    from tests.host import browser

    if not Path(browser.CHROMIUM).exists():
        pytest.skip("Chromium is not installed")
    with browser.chromium() as running:
        yield running


@pytest.fixture
def client(server):
    """The HTTP client of `server`."""
    return server.client


@pytest.fixture(autouse=True)
def unload_models():
    """Tests in this process leave no loaded model and no cancelled run for the next."""
    yield
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.interrupt_current_processing(False)
        management.unload_all_models()
        gc.collect()


@pytest.fixture(autouse=True)
def forget_trainings() -> Iterator[Callable[[], None]]:
    """Trainings that are kept in this process are not used by other tests. `forget_trainings()` makes the next one
    start again.
    """

    def forget() -> None:
        host = sys.modules.get("folder_paths")
        for state in Path(host.models_dir).glob("sa_inject/training_states/*") if host is not None else ():
            state.unlink()

    forget()
    yield forget
    forget()


@pytest.fixture
def shown_texts(comfy_host, monkeypatch) -> list[str]:
    """The texts that nodes showed below themselves."""
    import server

    texts: list[str] = []
    monkeypatch.setattr(server.PromptServer.instance, "send_progress_text", lambda text, node_id: texts.append(text))
    return texts


@pytest.fixture
def adapters_folder(comfy_host, pack_nodes) -> Iterator[Path]:
    """models/sa_inject, empty before and after."""
    found = comfy_host.base / "models/sa_inject"
    shutil.rmtree(found, ignore_errors=True)
    yield found
    shutil.rmtree(found, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        report.sections.append(("ComfyUI server log", server.log_tail()))
    return report


@pytest.fixture(scope="module")
def bench(comfy_host, pack_nodes):
    """The bench's modules importable, and the demo's, which they use."""
    for name in ("bench", "demo"):
        if name not in sys.modules:
            import_folder(name, ROOT / name)
