"""Adapter files in the host's folders: listed, read, refused, written, and never lost."""

import base64
import dataclasses
import io
import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.core.tiny_adapter import contents
from tests.host.adapters import base_model, make_adapter, random

SMALL = {"resolution": 64, "steps": 1, "rank": 2, "alpha": 2.0, "previews": 0, "sample_every": 0, "seed": 5}
PROMPT = {"7": {"class_type": "TrainSAInjectAdapter", "inputs": {"seed": 5}}}
WORKFLOW = {"workflow": {"nodes": [{"id": 7, "type": "TrainSAInjectAdapter"}], "links": []}}


@pytest.fixture(scope="module")
def train(comfy_host, folder, sd15):
    """`adapter, clip, loss_map, previews = train("name")`, after one step on two pictures."""

    def run(file_name: str, **inputs) -> tuple:
        model, clip, vae = sd15
        images = random(2, 64, 64, 3).sigmoid()
        inputs = {"model": model, "clip": clip, "vae": vae, "images": images, **SMALL, **inputs}
        return comfy_host.execute("TrainSAInjectAdapter", file_name=file_name, **inputs)

    return run


@pytest.fixture(scope="module")
def trained(train):
    """The outputs of one training, and the path of its file."""
    return train("toys/robot", class_word="toy robot", lora_learning_rate=1e-2, captions="a photo of sainj")


@pytest.fixture
def good(folder, trained, request) -> Path:
    """A copy of the trained file, to be damaged."""
    path = folder / f"{re.sub(r'[^a-z_]', '', request.node.name)}.safetensors"
    path.write_bytes((folder / "toys/robot.safetensors").read_bytes())
    return path


@pytest.fixture(scope="module")
def load(comfy_host, folder):
    def run(path: Path, **inputs) -> Any:
        return comfy_host.execute("LoadSAInjectAdapter", adapter_name=str(path.relative_to(folder)), **inputs)

    return run


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str | None) -> None:
    """Change tensors or metadata of a file; a metadata entry of None goes."""
    old_tensors, old = contents(path)
    entries = {key: value for key, value in {**old, **metadata}.items() if value is not None}
    save_file(old_tensors if tensors is None else tensors, path, metadata=entries)


def first_lora_key(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in sorted(tensors) if ".lora_" in key)


def save(
    adapter: Any, path: Path, prompt: Any = None, workflow: Any = None, picture: Any = None, version: str = "1"
) -> None:
    """As the training node does. The file is at `path`, or the test fails."""
    from sa_inject.nodes.host.provenance import Provenance
    from sa_inject.nodes.host.saving import save_new_adapter

    picture = torch.rand(1, 3, 8, 8) if picture is None else picture
    saved = save_new_adapter(adapter, path, Provenance(prompt or {}, workflow or {}, version, picture))
    assert saved.text == f"saved {path.name}" and path.is_file()


# --- listed -----------------------------------------------------------------------------------------------------------


def options_of(node: Any) -> list[str]:
    return node.INPUT_TYPES()["required"]["adapter_name"][1]["options"]


def test_list_follows_the_folder(pack_nodes, folder, good):
    node = pack_nodes["LoadSAInjectAdapter"]
    assert good.name in options_of(node)
    (folder / "new folder").mkdir()
    added = folder / "new folder" / "added.safetensors"
    added.write_bytes(good.read_bytes())
    (folder / "notes.txt").write_text("not an adapter")
    (folder / "old.ckpt").write_text("not an adapter")
    assert str(added.relative_to(folder)) in options_of(node)
    assert not {"notes.txt", "old.ckpt"} & set(options_of(node))
    assert not [name for name in options_of(node) if ".part" in name]
    added.unlink()
    assert str(added.relative_to(folder)) not in options_of(node)


def test_list_survives_a_sub_folder_that_is_deleted(pack_nodes, folder, good):
    (folder / "for a while").mkdir()
    (folder / "for a while/robot.safetensors").write_bytes(good.read_bytes())
    assert "for a while/robot.safetensors" in [
        name.replace("\\", "/") for name in options_of(pack_nodes["LoadSAInjectAdapter"])
    ]
    shutil.rmtree(folder / "for a while")
    assert good.name in options_of(pack_nodes["LoadSAInjectAdapter"])


def test_fingerprint_follows_the_file(pack_nodes, good):
    fingerprint = pack_nodes["LoadSAInjectAdapter"].fingerprint_inputs
    first = fingerprint(adapter_name=good.name, write_embedding=False)
    assert fingerprint(adapter_name=good.name, write_embedding=False) == first
    rewrite(good, seed="99999")
    second = fingerprint(adapter_name=good.name, write_embedding=False)
    assert second != first
    good.unlink()
    assert fingerprint(adapter_name=good.name, write_embedding=False) not in (first, second)


def test_missing_file_is_named(load, folder):
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        load(folder / "gone.safetensors")


# --- read -------------------------------------------------------------------------------------------------------------


def test_loaded_adapter_is_the_one_that_training_handed_over(trained, load, good, sd15):
    adapter, patched_clip, *_ = trained
    loaded, clip = load(good, clip=sd15[1])
    assert loaded.info == adapter.info and loaded.name == good.stem
    learned = adapter.lora.state_dict()
    assert learned.keys() == loaded.lora.state_dict().keys()
    assert all(torch.equal(tensor, learned[key]) for key, tensor in loaded.lora.state_dict().items())
    assert torch.equal(loaded.token_embedding["clip_l"], adapter.token_embedding["clip_l"])
    ours, theirs = loaded.class_conditioning, adapter.class_conditioning
    assert torch.equal(ours.cross_attn, theirs.cross_attn) and torch.equal(ours.pooled, theirs.pooled)
    assert load(good)[1] is None  # no CLIP in, none out


def test_loaded_adapter_draws_what_the_socket_drew(comfy_host, trained, load, good, sd15):
    model, clip, vae = sd15
    adapter, patched_clip, *_ = trained
    (image_prompt,) = comfy_host.execute("EncodeImagePrompt", images=random(1, 64, 64, 3), vae=vae, resolution=64)
    (negative,) = comfy_host.execute("CLIPTextEncode", clip=clip, text="")
    (latent,) = comfy_host.execute("EmptyLatentImage", width=64, height=64)

    def draw(model: Any, clip: Any) -> torch.Tensor:
        (positive,) = comfy_host.execute("CLIPTextEncode", clip=clip, text="a photo of sainj toy")
        inputs = {"positive": positive, "negative": negative, "latent_image": latent, "seed": 1, "steps": 2}
        return comfy_host.execute("KSampler", model=model, **inputs)[0]["samples"]

    def apply(adapter: Any) -> Any:
        return comfy_host.execute("ApplySelfAttnInjection", model=model, adapter=adapter, image_prompt=image_prompt)[0]

    loaded, loaded_clip = load(good, clip=clip)
    assert torch.equal(draw(apply(loaded), loaded_clip), draw(apply(adapter), patched_clip))
    assert not torch.equal(draw(apply(adapter), patched_clip), draw(model, patched_clip))
    assert not torch.equal(draw(model, patched_clip), draw(model, clip))


def test_embedding_file_serves_stock_prompts(comfy_host, trained, load, good, sd15):
    clip = sd15[1]
    embedding = comfy_host.base / "models/embeddings" / good.name
    load(good)
    assert not embedding.exists()
    _, patched_clip = load(good, clip=clip, write_embedding=True)
    assert not list(embedding.parent.glob("*.part"))

    (word,) = comfy_host.execute("CLIPTextEncode", clip=patched_clip, text="a photo of sainj toy")
    (named,) = comfy_host.execute("CLIPTextEncode", clip=clip, text=f"a photo of embedding:{good.stem} toy")
    (plain,) = comfy_host.execute("CLIPTextEncode", clip=clip, text="a photo of sainj toy")
    assert torch.equal(word[0][0], named[0][0]) and not torch.equal(word[0][0], plain[0][0])


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(load, path: Path) -> str:
    """What the node says about a file. It always names it."""
    with pytest.raises(ValueError) as failure:
        load(path)
    assert path.name in str(failure.value)
    return str(failure.value)


def test_empty_file(load, good):
    good.write_bytes(b"")
    assert "is empty. Copy or train it again" in refused(load, good)


def test_truncated_file(load, good):
    whole = good.read_bytes()
    for length in (1, 8, 1000, len(whole) // 2, len(whole) - 1):
        good.write_bytes(whole[:length])
        words = refused(load, good)
        assert "truncated or damaged" in words and "train it again" in words


def test_text_file(load, good):
    good.write_text("<html>404 Not Found</html>")
    assert "truncated or damaged" in refused(load, good)


class Payload:
    opened = False

    def __reduce__(self):
        return (setattr, (Payload, "opened", True))


def test_pickled_file_is_not_opened(load, good):
    def write_zip() -> None:
        with zipfile.ZipFile(good, "w") as file:
            file.writestr("data.pkl", pickle.dumps(Payload()))

    for write in (
        write_zip,
        lambda: torch.save({"lora": Payload()}, good),
        lambda: good.write_bytes(pickle.dumps(Payload(), protocol=2)),
        lambda: good.write_bytes(pickle.dumps(Payload(), protocol=5)),
    ):
        write()
        words = refused(load, good)
        assert "pickled" in words and "was not opened" in words
        assert not Payload.opened


def test_other_safetensors_file(load, good):
    save_file({"lora_unet_mid.alpha": torch.ones(1)}, good)
    assert "not an SA-Inject adapter" in refused(load, good)


def test_file_of_a_later_version(load, good):
    rewrite(good, format_version="99")
    words = refused(load, good)
    assert "version 99" in words and "Update SA-Inject" in words


def test_missing_metadata(load, good):
    whole = good.read_bytes()
    for entry in ("architecture", "blocks", "rank", "alpha", "reference_mode", "placeholder", "class_word", "training"):
        good.write_bytes(whole)
        rewrite(good, **{entry: None})
        assert f"lacks the metadata entry '{entry}'" in refused(load, good)


def test_unreadable_metadata(load, good):
    whole = good.read_bytes()
    for entry, value in (("rank", "many"), ("blocks", "[[1, 2]]"), ("blocks", "{"), ("reference_mode", "dirty")):
        good.write_bytes(whole)
        rewrite(good, **{entry: value})
        assert "unreadable metadata" in refused(load, good)


def test_not_a_number(load, good):
    tensors, _ = contents(good)
    key = first_lora_key(tensors)
    tensors[key][0, 0] = float("nan")
    rewrite(good, tensors)
    words = refused(load, good)
    assert key in words and "NaN" in words and "lower learning rate" in words


def test_infinite_word(load, good):
    tensors, _ = contents(good)
    tensors["token_embedding.clip_l"][0, 0] = float("inf")
    rewrite(good, tensors)
    assert "token_embedding.clip_l" in refused(load, good)


def test_missing_key(load, good):
    tensors, _ = contents(good)
    for key in (first_lora_key(tensors), "token_embedding.clip_l", "reference_text.cross_attn"):
        rewrite(good, {name: tensor for name, tensor in tensors.items() if name != key})
        assert f"lacks {key.replace('clip_l', '<encoder>')}. The file is incomplete" in refused(load, good)


def test_surplus_key(load, good):
    tensors, _ = contents(good)
    tensors["lora_te_extra.weight"] = torch.ones(2)
    rewrite(good, tensors)
    words = refused(load, good)
    assert "holds lora_te_extra.weight" in words and "use the original file" in words


def test_misshapen_key(load, good):
    tensors, _ = contents(good)
    key = first_lora_key(tensors)
    tensors[key] = torch.zeros(3, 5)
    rewrite(good, tensors)
    words = refused(load, good)
    assert key in words and "shape (3, 5), expected (2, 320)" in words


def test_adapter_of_another_architecture(comfy_host, load, good, load_checkpoint):
    loaded, _ = load(good)
    other = load_checkpoint("sdxl")[0]
    prompt = comfy_host.execute("EncodeImagePrompt", images=random(1, 64, 64, 3), vae=load_checkpoint("sd15")[2])[0]
    with pytest.raises(ValueError, match=rf"'{good.stem}' was trained for SD1\.x .* is SDXL .*Connect a SD1\.x check"):
        comfy_host.execute("ApplySelfAttnInjection", model=other, adapter=loaded, image_prompt=prompt)
    with pytest.raises(ValueError, match="'sainj' was trained for clip_l, .* has clip_h"):
        load(good, clip=load_checkpoint("sd2")[1])


# --- file names -------------------------------------------------------------------------------------------------------


OUTSIDE = (
    "",
    " ",
    ".",
    "..",
    "../x",
    "toys/../../x",
    "..\\x",
    "/x",
    "\\x",
    "C:/x",
    "C:\\x",
    "toys/",
    "toys\\",
    "~/../../x",
)


def test_file_names_that_leave_the_folder_are_refused_before_training(train, folder, monkeypatch):
    monkeypatch.setattr("sa_inject.nodes.train.AdapterTraining", lambda *args, **kwargs: pytest.fail("it trained"))
    before = sorted(folder.parent.rglob("*"))
    for name in OUTSIDE:
        with pytest.raises(ValueError, match=re.escape(f"The file name '{name}' is not a name inside")) as failure:
            train(name)
        assert "such as 'toys/robot'" in str(failure.value)
    assert sorted(folder.parent.rglob("*")) == before


def test_sub_folders_and_extensions(train, folder):
    train("deep/er\\one.safetensors")
    assert (folder / "deep/er/one.safetensors").is_file()
    train("v1.5 näme")
    assert (folder / "v1.5 näme.safetensors").is_file()


def test_existing_file_is_never_overwritten(train, folder):
    older = [folder / "often.safetensors", folder / "often_00002.safetensors"]
    for path in older:
        path.write_text("precious")
    assert train("often")[0].name == "often_00003"
    assert (folder / "often_00003.safetensors").is_file()
    assert [path.read_text() for path in older] == ["precious"] * 2
    for path in older:
        path.unlink()


# --- written ----------------------------------------------------------------------------------------------------------


def test_metadata_of_a_trained_file(trained, folder):
    from sa_inject.nodes.version import VERSION

    tensors, metadata = contents(folder / "toys/robot.safetensors")
    assert set(tensors) == {
        *trained[0].lora.state_dict(),
        "token_embedding.clip_l",
        "reference_text.cross_attn",
        "reference_text.pooled",
    }
    assert all(key.startswith("base_model.model.") for key in trained[0].lora.state_dict())
    expected = {
        "format": "sa_inject",
        "format_version": "1",
        "architecture": "SD1.x",
        "rank": "2",
        "alpha": "2.0",
        "reference_mode": "clean",
        "placeholder": "sainj",
        "class_word": "toy robot",
        "seed": "5",
        "sa_inject_version": VERSION,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/sa-inject",
        "modelspec.title": "robot",
        "modelspec.trigger_phrase": "sainj toy robot",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "eps",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", metadata["date"])
    assert metadata["modelspec.date"] == metadata["date"]

    blocks = json.loads(metadata["blocks"])
    assert [tuple(block[:3]) for block in blocks] == [tuple(key) for key in trained[0].blocks()]
    assert blocks[0] == ["input", 1, 0, "input_blocks.1.1.transformer_blocks.0.attn1", 320, 320]
    training = json.loads(metadata["training"])
    chosen = {"steps": 1, "seed": 5, "lora_learning_rate": 1e-2, "batch_size": 1, "resolution": 64, "pictures": 2}
    assert {key: training[key] for key in chosen} == chosen


def test_thumbnail_is_a_jpeg(folder, trained):
    _, metadata = contents(folder / "toys/robot.safetensors")
    kind, data = metadata["modelspec.thumbnail"].split(",", 1)
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    assert (image.format, image.size) == ("JPEG", (256, 256))


def test_thumbnail_of_any_size(folder, trained):
    for height, width in ((1, 1), (3, 500), (700, 40)):
        path = folder / f"thumbnail {height}.safetensors"
        save(trained[0], path, picture=torch.rand(1, 3, height, width))
        data = contents(path)[1]["modelspec.thumbnail"].split(",", 1)[1]
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 256)


def test_workflow_is_embedded_as_the_host_does(folder, trained, monkeypatch):
    from comfy.cli_args import args

    path = folder / "with workflow.safetensors"
    save(trained[0], path, PROMPT, WORKFLOW, version="1.2.3")
    _, metadata = contents(path)
    assert json.loads(metadata["prompt"]) == PROMPT
    assert json.loads(metadata["workflow"]) == WORKFLOW["workflow"]
    assert metadata["sa_inject_version"] == "1.2.3"

    monkeypatch.setattr(args, "disable_metadata", True)
    path = folder / "without workflow.safetensors"
    save(trained[0], path, PROMPT, WORKFLOW, version="1.2.3")
    assert not {"prompt", "workflow"} & set(contents(path)[1])


def test_workflow_cannot_overwrite_what_the_adapter_says(folder, trained, load):
    path = folder / "strange workflow.safetensors"
    save(trained[0], path, PROMPT, {"format": "x", "rank": 99})
    assert load(path)[0].info == trained[0].info


def test_broken_adapter_never_hides_a_programming_error(folder, trained, monkeypatch):
    from sa_inject.core import adapter_file

    monkeypatch.setattr(adapter_file, "save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(trained[0], folder / "never.safetensors")
    assert not list(folder.glob("*never*"))


def test_full_size_sd15_adapter_of_rank_16_is_small(comfy_host, folder, load):
    from sa_inject.core.kv import BlockKey
    from sa_inject.core.layers import SelfAttentionLayer
    from sa_inject.core.lora import SelfAttentionLoRA

    widths = {("input", i): w for i, w in ((1, 320), (2, 320), (4, 640), (5, 640), (7, 1280), (8, 1280))}
    widths |= {("middle", 0): 1280} | {("output", i): (1280, 640, 320)[i // 3 - 1] for i in range(3, 12)}
    layers = tuple(
        SelfAttentionLayer(
            BlockKey(stage, index, 0),
            f"{'middle_block' if stage == 'middle' else f'{stage}_blocks.{index}'}.1.transformer_blocks.0.attn1",
            width,
            width,
        )
        for (stage, index), width in widths.items()
    )
    assert len(layers) == 16
    small = make_adapter(base_model(comfy_host, "sd15"))
    adapter = dataclasses.replace(
        small,
        name="full size",
        info=dataclasses.replace(small.info, layers=layers, rank=16, alpha=16.0),
        lora=SelfAttentionLoRA(layers, 16, 16.0, torch.Generator().manual_seed(0)),
        class_conditioning=small.class_conditioning._replace(cross_attn=random(1, 77, 768), pooled=random(1, 768)),
    )
    path = folder / "full size.safetensors"
    workflow = {"workflow": {"nodes": [{"id": i, "widgets_values": ["x" * 100]} for i in range(50)]}}
    save(adapter, path, PROMPT, workflow, torch.rand(1, 3, 512, 512))
    assert path.stat().st_size <= 3.4e6
    assert load(path)[0].info == adapter.info
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
