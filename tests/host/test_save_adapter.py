"""Adapters become files: under names that work everywhere, where writing was tried first, never over another file."""

import contextlib
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.host.adapters import base_model, make_adapter
from tests.host.client import PromptFailed
from tests.host.trainings import same_adapter

SMALL = {"resolution": 64, "steps": 1, "rank": 2, "alpha": 2.0, "previews": 0, "sample_every": 0, "seed": 8}
IMPOSSIBLE = ("robot?", "CON", "toys/nul", "a|b", "robot.", "toys /robot", "toys./robot", "a\tb", "x" * 201, "a\ud800")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="/sys is where nobody may write, not even root")


@pytest.fixture
def adapter(comfy_host) -> Any:
    return make_adapter(base_model(comfy_host, "sd15"))


@pytest.fixture
def save(comfy_host, folder) -> Callable[..., Any]:
    return lambda adapter, name: comfy_host.execute("SaveSAInjectAdapter", adapter=adapter, file_name=name)[0]


@pytest.fixture
def train(comfy_host, folder, sd15) -> Callable[..., Any]:
    """`adapter, clip, loss_map, previews = train("name", in_first_step=...)`; what is kept of it goes."""

    def run(name: str, in_first_step: Callable[[], object] = lambda: None, **inputs) -> tuple:
        model, clip, vae = sd15
        images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        inputs = {"model": model, "clip": clip, "vae": vae, "images": images, **SMALL, **inputs}
        handle = model.model.diffusion_model.out.register_forward_pre_hook(lambda *_: (in_first_step(), None)[1])
        try:
            return comfy_host.execute("TrainSAInjectAdapter", file_name=name, **inputs)
        finally:
            handle.remove()
            for state in (folder / "training_states").glob("*"):
                state.unlink()

    return run


@pytest.fixture
def refused(train, save, adapter, folder, monkeypatch) -> Callable[[str], str]:
    """What both nodes say of a name, before any step; nothing is left."""
    monkeypatch.setattr("sa_inject.nodes.train.AdapterTraining", lambda *args, **kwargs: pytest.fail("it trained"))

    def run(name: str) -> str:
        before = files(folder)
        with pytest.raises((ValueError, OSError)) as by_train:
            train(name)
        with pytest.raises((ValueError, OSError)) as by_save:
            save(adapter, name)
        assert str(by_train.value).split(" MB ")[-1] == str(by_save.value).split(" MB ")[-1]
        assert files(folder) == before
        return str(by_train.value)

    return run


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond so many bytes, as it does when a disk or a quota is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> list[Path]:
    """All but what is kept of trainings."""
    return sorted(path for path in folder.rglob("*") if "training_states" not in path.parts)


def in_half(adapter: Any) -> Any:
    """With the values that a file holds."""
    adapter.lora.load_state_dict({key: tensor.half().float() for key, tensor in adapter.lora.state_dict().items()})
    adapter.token_embedding = {key: tensor.half().float() for key, tensor in adapter.token_embedding.items()}
    return adapter


# --- before the first step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=ascii)
def test_name_that_is_impossible_somewhere(refused, name):
    words = refused(name)
    assert words.startswith(f"The file name '{name}' cannot be used: ") and "such as 'toys/robot'" in words


def test_folder_that_is_a_file(refused, folder):
    (folder / "a file").write_text("")
    words = refused("a file/robot")
    assert str(folder / "a file") in words and "choose another file_name" in words
    (folder / "a file").unlink()


@pytest.fixture
def link_to(folder) -> Iterator[Callable[[Path], Path]]:
    """A sub-folder `link` that leads elsewhere until the test ends."""

    def make(target: Path) -> Path:
        shutil.rmtree(folder / "link", ignore_errors=True)
        (folder / "link").symlink_to(target, target_is_directory=True)
        return folder / "link"

    yield make
    (folder / "link").unlink(missing_ok=True)


@needs_linux
@pytest.mark.parametrize("name", ["link/robot", "link/new/deeper/robot"])
def test_folder_where_nobody_may_write(refused, link_to, name):
    link_to(Path("/sys"))
    words = refused(name)
    assert "denied" in words or "not permitted" in words
    assert "allow writing there" in words


def test_no_room(refused, folder):
    with no_file_above(200_000):
        words = refused("new folder/robot")
    assert "MB cannot be saved to" in words and "too large" in words and "Make room" in words


def test_room_that_is_asked_for_grows_with_the_rank(train, monkeypatch):
    monkeypatch.setattr("sa_inject.nodes.train.AdapterTraining", lambda *args, **kwargs: pytest.fail("it trained"))
    with no_file_above(1_500_000):
        with pytest.raises(pytest.fail.Exception, match="it trained"):
            train("robot", rank=4)
        with pytest.raises(OSError, match="Make room"):
            train("robot", rank=128)


def test_name_is_refused_when_it_is_queued(server, adapter):
    from sa_inject.core.adapter_file import save_adapter

    folder = server.base / "models/sa_inject"
    save_adapter(adapter, folder / "to save.safetensors")
    graph = {
        "1": {"class_type": "LoadSAInjectAdapter", "inputs": {"write_embedding": False}},
        "2": {"class_type": "SaveSAInjectAdapter", "inputs": {"adapter": ["1", 0], "file_name": "robot?"}},
    }
    graph["1"]["inputs"]["adapter_name"] = "to save.safetensors"
    with pytest.raises(PromptFailed, match="The file name 'robot\\?' cannot be used"):
        server.client.queue(graph)
    graph["2"]["inputs"]["file_name"] = "toys/saved"
    server.client.run(graph)
    assert (folder / "toys/saved.safetensors").is_file()


# --- names ------------------------------------------------------------------------------------------------------------


def test_sub_folder_may_be_a_link_to_elsewhere(train, save, adapter, link_to, tmp_path):
    link_to(tmp_path)
    assert train("link/trained")[0].name == "trained"
    save(adapter, "link/deeper/saved.SafeTensors")
    assert (tmp_path / "trained.safetensors").is_file() and (tmp_path / "deeper/saved.safetensors").is_file()


def test_file_that_comes_during_the_training_is_not_replaced(train, folder):
    file = folder / "meanwhile.safetensors"
    adapter, *_ = train("meanwhile", in_first_step=lambda: file.write_text("precious"))
    assert file.read_text() == "precious"
    assert adapter.name == "meanwhile_00002" and (folder / "meanwhile_00002.safetensors").is_file()


def test_file_that_comes_while_it_is_saved_is_not_replaced(save, adapter, folder, monkeypatch):
    from sa_inject.nodes.host import saving

    def came_meanwhile(adapter, title, provenance):
        (folder / f"{title}.safetensors").write_text("precious") if "_0" not in title else None
        return {}

    monkeypatch.setattr(saving, "file_metadata", came_meanwhile)
    assert save(adapter, "race").name == "race_00002"
    assert (folder / "race.safetensors").read_text() == "precious"


# --- when it fails at the end all the same ----------------------------------------------------------------------------


@needs_linux
def test_adapter_that_cannot_be_saved_goes_to_the_temporary_folder(train, link_to, shown_texts, comfy_host):
    from sa_inject.core.adapter_file import load_adapter

    adapter, _, loss_map, *_ = train("link/robot", in_first_step=lambda: link_to(Path("/sys")))
    rescued = comfy_host.base / "temp/sa_inject/robot.safetensors"
    assert shown_texts[-1].startswith("NOT SAVED to models/sa_inject (") and "Permission denied" in shown_texts[-1]
    assert str(rescued) in shown_texts[-1] and "move it" in shown_texts[-1]
    assert same_adapter(load_adapter(rescued), adapter) and len(loss_map["loss"]) == 1


@pytest.mark.parametrize("trouble", ["disk", "rename"])
def test_adapter_that_can_be_saved_nowhere_is_still_there(
    train, folder, shown_texts, comfy_host, sd15, save, monkeypatch, trouble
):
    undo = contextlib.ExitStack()

    def begin() -> None:
        if trouble == "disk":
            undo.enter_context(no_file_above(50_000))
        else:
            monkeypatch.setattr("os.link", denied)
            monkeypatch.setattr("os.replace", denied)

    def denied(*names: object) -> None:
        raise PermissionError(13, "Permission denied")

    with undo:
        adapter, clip, *_ = train(f"no room {trouble}", in_first_step=begin)
    monkeypatch.undo()
    assert shown_texts[-1].startswith("NOT SAVED (") and "Save SA-Inject Adapter" in shown_texts[-1]
    for place in (folder, comfy_host.base / "temp"):
        files = [path for path in place.rglob("*") if path.is_file()]
        assert not [path for path in files if "no room" in path.name or path.suffix == ".part"]
    comfy_host.execute("CLIPTextEncode", clip=clip, text="sainj")
    assert same_adapter(save(adapter, f"made room {trouble}"), adapter)


# --- SaveSAInjectAdapter ----------------------------------------------------------------------------------------------


def test_saved_adapter_is_the_one_that_load_finds(save, adapter, comfy_host):
    saved = save(adapter, "sub/saved")
    assert saved.name == "saved" and adapter.name != "saved"  # the one that came in keeps its own
    loaded, _ = comfy_host.execute("LoadSAInjectAdapter", adapter_name=str(Path("sub/saved.safetensors")))
    assert same_adapter(loaded, in_half(adapter)) and loaded.info == adapter.info


def test_file_that_holds_the_adapter_already_is_used(save, adapter, folder, comfy_host):
    other = make_adapter(base_model(comfy_host, "sd15"), seed=1)
    assert [save(a, "again").name for a in (adapter, other, adapter, other)] == ["again", "again_00002"] * 2
    assert len(list(folder.glob("again*"))) == 2
    (folder / "again.safetensors").unlink()  # a gap does not hide the one behind it
    assert save(other, "again").name == "again_00002"
    assert not (folder / "again.safetensors").exists()


def test_saved_file_names_the_graph_that_saved_it(folder, adapter):
    from sa_inject.nodes.host.provenance import Provenance
    from sa_inject.nodes.host.saving import save_new_adapter

    path = folder / "graph.safetensors"
    save_new_adapter(adapter, path, Provenance({"1": {}}, {"workflow": {"nodes": []}}, "9.9"))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["workflow"]) == {"nodes": []} and metadata["sa_inject_version"] == "9.9"
    assert "modelspec.thumbnail" not in metadata


def test_deleted_file_is_saved_again_by_the_next_run(pack_nodes, save, adapter, folder):
    fingerprint = pack_nodes["SaveSAInjectAdapter"].fingerprint_inputs
    save(adapter, "deleted")
    first = fingerprint(file_name="deleted")
    assert fingerprint(file_name="deleted") == first
    (folder / "deleted.safetensors").unlink()
    assert fingerprint(file_name="deleted") != first
    assert fingerprint() == fingerprint(file_name=None)  # it comes from another node
