"""LoadSAInjectAdapter: which folder, which word, which embedding file, and when it reads a file again."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.host.adapters import base_model, conditioning, make_adapter, make_prompt, sample
from tests.host.learned_words import encoded


@pytest.fixture(scope="module")
def embeddings(comfy_host) -> Path:
    return comfy_host.base / "models/embeddings"


@pytest.fixture(scope="module")
def clip(sd15_clip):
    return sd15_clip


@pytest.fixture
def write(comfy_host, folder, request):
    """`write("toys/robot", seed=3, placeholder_token="zwx")` puts an adapter there; `seed` decides its numbers."""
    from sa_inject.core.adapter_file import save_adapter

    written = []

    def run(name: str, seed: int = 0, placeholder_token: str = "sainj") -> str:
        adapter = make_adapter(base_model(comfy_host, "sd15"), seed=seed)
        adapter = dataclasses.replace(
            adapter, info=dataclasses.replace(adapter.info, placeholder_token=placeholder_token)
        )
        written.append(folder / f"{name}.safetensors")
        save_adapter(adapter, written[-1])
        return os.path.join(*f"{name}.safetensors".split("/"))

    yield run
    for path in written:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def load(comfy_host, pack_nodes):
    def run(name: str, **inputs) -> Any:
        return comfy_host.execute("LoadSAInjectAdapter", adapter_name=name, **inputs)

    return run


@pytest.fixture(scope="module")
def fingerprint(pack_nodes):
    return pack_nodes["LoadSAInjectAdapter"].fingerprint_inputs


# --- the word -------------------------------------------------------------------------------------------------------


def test_another_word_at_loading_time_means_the_subject(comfy_host, write, load, clip, caplog):
    first, second = write("one", seed=1), write("two", seed=2)
    _, own = load(first, clip=clip)
    adapter, both = load(second, clip=own, placeholder_token=" zwx ")
    assert adapter.info.placeholder_token == "zwx"
    assert torch.equal(encoded(comfy_host, both, "a sainj"), encoded(comfy_host, own, "a sainj"))
    alone = load(second, clip=clip)[1]
    assert torch.equal(encoded(comfy_host, both, "a zwx"), encoded(comfy_host, alone, "a sainj"))
    assert not torch.equal(encoded(comfy_host, both, "a zwx"), encoded(comfy_host, both, "a sainj"))
    assert "already reads" not in caplog.text


def test_without_another_word_it_is_the_adapters_own(load, write, clip):
    name = write("one")
    assert (
        load(name, clip=clip)[0].info.placeholder_token
        == load(name, placeholder_token="")[0].info.placeholder_token
        == "sainj"
    )


@pytest.mark.parametrize("with_clip", [True, False])
@pytest.mark.parametrize("word", ["two words", "a,b", "embedding:x", "(x)"])
def test_a_word_that_no_prompt_can_hold_is_refused(write, load, clip, word, with_clip):
    with pytest.raises(ValueError, match="made-up word"):
        load(write("one"), placeholder_token=word, clip=clip if with_clip else None)


def test_an_ordinary_word_is_refused(write, load, clip):
    with pytest.raises(ValueError, match="'cat' is an ordinary word"):
        load(write("one"), placeholder_token="cat", clip=clip)


@pytest.mark.parametrize("second_word", ["sainj", "SainJ"])
def test_a_word_that_is_taken_on_this_clip_is_said(write, load, clip, caplog, shown_texts, second_word):
    one, two = write("one", seed=1), write("two", seed=2, placeholder_token=second_word)
    _, patched_clip = load(one, clip=clip)
    load(one, clip=patched_clip)  # the same word of the same adapter
    assert not shown_texts and "already reads" not in caplog.text
    load(two, clip=patched_clip)
    (text,) = shown_texts
    assert f"already reads '{second_word}'" in text and "placeholder_token" in text
    assert text in caplog.text


def test_saved_workflows_still_load(pack_nodes):
    """Widgets keep their places: what is new comes last."""
    types = pack_nodes["LoadSAInjectAdapter"].INPUT_TYPES()
    assert [*types["required"], *types["optional"]] == ["adapter_name", "write_embedding", "clip", "placeholder_token"]


def test_training_says_when_an_adapter_has_the_word_already(comfy_host, write, folder, load_checkpoint, caplog):
    from sa_inject.core import adapter_file

    model, clip, vae = load_checkpoint("sd15")
    settings = {
        "resolution": 64,
        "steps": 1,
        "rank": 2,
        "previews": 0,
        "sample_every": 0,
        "images": torch.rand(2, 64, 64, 3),
    }
    names = [write(f"taken/{number}", placeholder_token="QWZL") for number in range(5)]
    (folder / "taken/notes.safetensors").write_text("no adapter")
    (folder / "taken/lora.safetensors").write_bytes(b"")
    save_file({"x": torch.ones(1)}, folder / "taken/lora.safetensors", metadata={"placeholder": "qwzl"})

    def warnings(word: str) -> list[str]:
        caplog.clear()
        inputs = {"model": model, "clip": clip, "vae": vae, "placeholder_token": word, "file_name": f"new-{word}"}
        comfy_host.execute("TrainSAInjectAdapter", **inputs, **settings)
        return [record.message for record in caplog.records if "is already that of" in record.message]

    (said,) = warnings("qwzl")
    assert all(name in said for name in names[:3]) and "and 2 more" in said
    assert "notes" not in said and "lora" not in said
    assert warnings("qwzlb") == []

    from sa_inject.nodes.host import adapter_index

    opened: list[Path] = []
    real = adapter_file.adapter_metadata
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_index, "adapter_metadata", lambda path: opened.append(path) or real(path))
        assert len(adapter_index.adapters_with_word("qwzl")) == 6 and len(opened) <= 1  # the new one, if at all
        write("taken/0", placeholder_token="other")
        assert len(adapter_index.adapters_with_word("qwzl")) == 5


# --- the embedding file -----------------------------------------------------------------------------------------------


def test_adapters_of_one_name_in_two_folders_have_two_embeddings(comfy_host, write, load, embeddings, clip):
    toy, car = write("toys/robot", seed=1), write("cars/robot", seed=2)
    for name in (toy, car):
        load(name, write_embedding=True)
    assert not (embeddings / "robot.safetensors").exists()
    for name in (toy, car):
        patched_clip = load(name, clip=clip)[1]
        named = encoded(comfy_host, clip, f"a photo of embedding:{name.removesuffix('.safetensors')} toy")
        assert torch.equal(named, encoded(comfy_host, patched_clip, "a photo of sainj toy"))


def user_files(embeddings: Path, other: Path) -> dict[str, Path]:
    return {
        "safetensors": embeddings / "mine.safetensors",
        "pickle": embeddings / "mine.pt",
        "binary": embeddings / "mine.bin",
        "without extension": embeddings / "mine",
        "in another folder": other / "mine.safetensors",
    }


@pytest.mark.parametrize(
    "kind", ["safetensors", "pickle", "binary", "without extension", "in another folder", "damaged", "same shape"]
)
def test_an_embedding_of_the_user_keeps_its_meaning(write, load, embeddings, tmp_path, monkeypatch, kind):
    import folder_paths

    folders = folder_paths.folder_names_and_paths["embeddings"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([*folders[0], str(tmp_path)], folders[1]))
    path = user_files(embeddings, tmp_path).get(kind, embeddings / "mine.safetensors")
    name = write("mine")
    if path.suffix != ".safetensors":
        torch.save({"emb_params": torch.ones(1, 768)}, path)
    elif kind == "damaged":
        path.write_text("an older file of that name")
    else:
        key = "clip_l" if kind == "same shape" else "emb_params"
        save_file({key: torch.ones(1, 768)}, path, metadata={"format": "pt"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="did not write it. Move that file, rename the adapter, or") as failure:
        load(name, write_embedding=True)
    assert str(path) in str(failure.value)
    assert path.read_bytes() == before
    assert [p for p in embeddings.glob("mine*") if p != path] == []
    path.unlink()
    load(name, write_embedding=True)
    (embeddings / "mine.safetensors").unlink()


@pytest.mark.parametrize("marked", [True, False], ids=["marked as ours", "of an older version, the same word"])
def test_our_own_embedding_is_replaced(write, load, embeddings, marked):
    load(write("ours", seed=1), write_embedding=True)
    path = embeddings / "ours.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "sa_inject_embedding"}
    first = load_file(path)["clip_l"]
    if not marked:
        save_file({"clip_l": first}, path)
        load(write("ours", seed=1), write_embedding=True)
        assert torch.equal(load_file(path)["clip_l"], first)
    load(write("ours", seed=2), write_embedding=True)
    assert not torch.equal(load_file(path)["clip_l"], first)
    path.unlink()


def test_a_deleted_embedding_makes_a_cached_load_run_again(write, load, embeddings, fingerprint):
    name = write("gone")

    def queue() -> str:
        return fingerprint(adapter_name=name, write_embedding=True)

    first = queue()
    load(name, write_embedding=True)
    assert queue() == first  # what was written does not make it run again
    (embeddings / "gone.safetensors").unlink()
    assert fingerprint(adapter_name=name, write_embedding=False) == first
    second = queue()
    assert second != first
    load(name, write_embedding=True)
    assert (embeddings / "gone.safetensors").is_file() and queue() == second
    (embeddings / "gone.safetensors").unlink()
    assert queue() not in (first, second)


# --- when a file is read again ----------------------------------------------------------------------------------------


def test_two_saves_in_one_moment_are_told_apart(write, folder, fingerprint):
    found = set()
    moment = time.time_ns()
    for seed in range(3):
        name = write("quick", seed=seed)
        os.utime(folder / name, ns=(moment, moment))
        found.add(fingerprint(adapter_name=name))
    assert len(found) == 3


def test_a_file_that_has_not_changed_is_not_read_again(write, folder, fingerprint, monkeypatch):
    name = write("old")
    os.utime(folder / name, (1e9, 1e9))
    first = fingerprint(adapter_name=name)
    real, opened = Path.open, []
    monkeypatch.setattr(Path, "open", lambda self, *args: opened.append(self) or real(self, *args))
    assert fingerprint(adapter_name=name) == first and opened == []
    monkeypatch.undo()
    (folder / name).write_bytes((folder / name).read_bytes())
    assert fingerprint(adapter_name=name) == first  # the same content
    write("old", seed=1)
    os.utime(folder / name, (1e9, 1e9))
    assert fingerprint(adapter_name=name) != first


def test_a_file_of_others_is_not_hashed(folder, fingerprint):
    path = folder / "checkpoint.safetensors"
    size = 2**33
    header = json.dumps({"model.weight": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with path.open("r+b") as file:  # a hole: it takes no room, and seconds to read
        file.truncate(8 + len(header) + size)
    started = time.perf_counter()
    first = fingerprint(adapter_name=path.name)
    assert time.perf_counter() - started < 0.5
    assert fingerprint(adapter_name=path.name) == first
    path.unlink()
    assert fingerprint(adapter_name=path.name) == fingerprint(adapter_name="none.safetensors") != first


@pytest.mark.parametrize("inputs", [{"adapter_name": None, "write_embedding": None}, {}])
def test_a_linked_name_is_answered_by_the_folder(write, folder, fingerprint, inputs):
    """The host gives None for what another node will say, or leaves it out."""
    write("linked", seed=1)
    first = fingerprint(**inputs)
    assert fingerprint(**inputs) == first
    write("linked", seed=2)
    second = fingerprint(**inputs)
    assert second != first
    write("linked two")
    assert fingerprint(**inputs) not in (first, second)


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def host_paths(comfy_host, pack_nodes, tmp_path, monkeypatch):
    """`host_paths({"section": {...}}, ...)`: the adapter folders after the host has read these files, then our pack."""
    import folder_paths
    import utils.extra_config
    from comfy.cli_args import args

    from sa_inject.nodes.host.files import register_folder

    known = {name: ([*paths], set(kinds)) for name, (paths, kinds) in folder_paths.folder_names_and_paths.items()}

    def run(*contents: dict) -> list[str]:
        names = dict(known)
        del names["sa_inject"]
        monkeypatch.setattr(folder_paths, "folder_names_and_paths", names)
        files = []
        for number, content in enumerate(contents):
            files.append(str(tmp_path / f"paths-{number}.yaml"))
            Path(files[-1]).write_text(json.dumps(content))  # JSON is YAML
            utils.extra_config.load_extra_path_config(files[-1])
        monkeypatch.setattr(args, "extra_model_paths_config", [files])
        register_folder()
        register_folder()
        return folder_paths.get_folder_paths("sa_inject")

    return run


def test_the_users_default_folder_is_where_adapters_go(host_paths, comfy_host, tmp_path):
    ours = str(comfy_host.base / "models/sa_inject")
    base, mine, other = {"base_path": str(tmp_path / "d")}, {"sa_inject": "adapters"}, {"sa_inject": "more"}
    in_d = [str(tmp_path / "d/adapters"), str(tmp_path / "d/more")]
    assert host_paths() == [ours]
    assert host_paths({"a": {**base, **mine}}) == [ours, in_d[0]]
    assert host_paths({"a": {**base, **mine, "is_default": False}}) == [ours, in_d[0]]
    assert host_paths({"a": {**base, **mine, "is_default": True}}) == [in_d[0], ours]
    assert host_paths({"a": {**base, **mine, "is_default": True}, "b": {**base, **other}}) == [in_d[0], ours, in_d[1]]
    two = {"a": {**base, **mine, "is_default": True}, "b": {**base, **other, "is_default": True}}
    assert host_paths(two) == [in_d[1], in_d[0], ours]
    assert host_paths({"a": two["a"]}, {"b": two["b"]}) == [in_d[1], in_d[0], ours]
    assert host_paths({"a": {"sa_inject": "beside", "is_default": True}}) == [str(tmp_path / "beside"), ours]
    assert host_paths({"a": {**base, "loras": "x", "is_default": True}, "b": None}) == [ours]


# --- what the model predicts ------------------------------------------------------------------------------------------


def apply(comfy_host, model: Any, adapter: Any) -> Any:
    inputs = {"adapter": adapter, "image_prompt": make_prompt(), "start_percent": 0.0}
    return comfy_host.execute("ApplySelfAttnInjection", model=model, **inputs)[0]


def trained_on(model: Any) -> Any:
    """An adapter by hand that says of its model what training says."""
    from sa_inject.nodes.host.networks.unet import prediction_type

    adapter = make_adapter(model)
    training = {"prediction_type": prediction_type(model)}
    return dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, training=training))


def sampling(comfy_host, model: Any, kind: str) -> Any:
    return comfy_host.execute("ModelSamplingDiscrete", model=model, sampling=kind)[0]


@pytest.mark.parametrize(("trained", "drawn"), [("sd2", "sd2_v"), ("sd2_v", "sd2")])
def test_a_model_that_predicts_something_else_is_refused(comfy_host, trained, drawn):
    words = {"sd2": "eps", "sd2_v": "v_prediction"}
    adapter = trained_on(base_model(comfy_host, trained))
    apply(comfy_host, base_model(comfy_host, trained), adapter)
    with pytest.raises(ValueError, match=f"predicts {words[trained]}, but .* predicts {words[drawn]}.*Discrete before"):
        apply(comfy_host, base_model(comfy_host, drawn), adapter)


def test_a_v_model_that_the_host_takes_for_eps_works_with_the_node_that_says_so(comfy_host):
    """As finetunes of SDXL are used that carry no mark of their kind."""
    plain = base_model(comfy_host, "sd15")
    as_v = sampling(comfy_host, plain, "v_prediction")
    adapter = trained_on(as_v)
    assert adapter.info.training["prediction_type"] == "v_prediction"
    drawing = apply(comfy_host, as_v, adapter)
    assert bool(sample(comfy_host, drawing, positive=conditioning(plain, 1)).isfinite().all())
    with pytest.raises(ValueError, match="predicts v_prediction, but .* predicts eps"):
        apply(comfy_host, plain, adapter)


@pytest.mark.parametrize("kind", ["eps", "lcm"])
def test_a_schedule_of_the_same_kind_is_no_other_model(comfy_host, kind):
    plain = base_model(comfy_host, "sd15")
    apply(comfy_host, sampling(comfy_host, plain, kind), trained_on(plain))


@pytest.mark.parametrize("training", [{}, {"prediction_type": "v_prediction_edm"}, {"prediction_type": None}])
def test_an_adapter_that_does_not_say_loads_on_any(comfy_host, training):
    adapter = make_adapter(base_model(comfy_host, "sd2"))
    adapter = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, training=training))
    apply(comfy_host, base_model(comfy_host, "sd2_v"), adapter)
