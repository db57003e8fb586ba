"""Adapter files: saving and loading keeps everything, a bad file is refused with a reason, a failed write leaves
nothing.
"""

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sa_inject.core import adapter_file
from sa_inject.core.adapter import Adapter
from sa_inject.core.adapter_file import AdapterFileError, adapter_bytes, holds_adapter, load_adapter, save_adapter
from tests.core.tiny_adapter import contents, random_adapter

FIRST_B = "base_model.model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.lora_B.weight"


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {
        **adapter.lora.state_dict(),
        **adapter.token_embedding,
        "cross_attn": adapter.class_conditioning.cross_attn,
    }
    return (
        tensors
        if adapter.class_conditioning.pooled is None
        else {**tensors, "pooled": adapter.class_conditioning.pooled}
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return random_adapter()


@pytest.fixture(scope="module")
def whole(adapter, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    save_adapter(adapter, path)
    return path.read_bytes()


# --- Round trip


@pytest.mark.parametrize("pooled", [False, True])
def test_adapter_goes_round(tmp_path, pooled):
    adapter = random_adapter(pooled=pooled)
    save_adapter(adapter, tmp_path / "sub" / "my teapot.v2.safetensors")
    loaded = load_adapter(tmp_path / "sub" / "my teapot.v2.safetensors")
    assert loaded.name == "my teapot.v2"
    assert loaded.info == adapter.info
    assert (loaded.lora.rank, loaded.lora.alpha, loaded.lora.layers) == (3, 6.0, adapter.info.layers)
    expected, found = tensors_of(adapter), tensors_of(loaded)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.half().float()), key
    assert all(parameter.requires_grad for parameter in loaded.lora.parameters())


def test_other_precision_goes_round_exactly(tmp_path, adapter):
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    found = tensors_of(load_adapter(tmp_path / "a.safetensors"))
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors_of(adapter).items())


def test_file_holds_peft_keys_a_token_per_encoder_and_the_text(tmp_path, adapter):
    save_adapter(adapter, tmp_path / "a.safetensors")
    tensors, _ = contents(tmp_path / "a.safetensors")
    rest = {"token_embedding.clip_l", "token_embedding.clip_g", "reference_text.cross_attn"}
    assert set(tensors) == set(adapter.lora.state_dict()) | rest
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_metadata_of_others_is_kept_and_cannot_pass_for_ours(tmp_path, adapter):
    extra = {"modelspec.title": "A teapot", "workflow": '{"nodes": []}', "rank": "99", "format": "pt"}
    save_adapter(adapter, tmp_path / "a.safetensors", extra)
    _, metadata = contents(tmp_path / "a.safetensors")
    assert (metadata["modelspec.title"], metadata["workflow"]) == ("A teapot", '{"nodes": []}')
    assert (metadata["format"], metadata["format_version"], metadata["rank"]) == ("sa_inject", "1", "3")
    assert load_adapter(tmp_path / "a.safetensors").info == adapter.info


def test_saving_leaves_the_adapter_and_only_the_file(tmp_path, adapter):
    before = {key: tensor.clone() for key, tensor in tensors_of(adapter).items()}
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert list(files_in(tmp_path)) == ["a.safetensors"]
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors_of(adapter).items())
    assert {tensor.dtype for tensor in tensors_of(adapter).values()} == {torch.float32}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_file_can_be_read_by_others(tmp_path, adapter):
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_reading_draws_no_random_numbers_of_others(tmp_path, adapter):
    save_adapter(adapter, tmp_path / "a.safetensors")
    before = torch.get_rng_state()
    load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_adapter_does_not_need_its_file(tmp_path, adapter):
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path, dtype=torch.float32)
    loaded = load_adapter(path)
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place, as a mapping would see it
        file.write(bytes(size))
    assert all(torch.equal(tensors_of(loaded)[key], tensor) for key, tensor in tensors_of(adapter).items())


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x04"])
def test_header_whose_length_looks_like_a_pickle_is_no_pickle(tmp_path, adapter, start):
    """The first eight bytes are a length. One in two thousand begins like a pickle."""
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path, {"workflow": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    wanted = 65536 + int.from_bytes(start, "little")
    save_adapter(adapter, path, {"workflow": "w" * (wanted - length)})
    assert path.read_bytes().startswith(start)
    assert load_adapter(path).info == adapter.info


# --- Files that are no adapter


def refused(path: Path) -> str:
    """What is said about a file. It always begins with the name and says what to do."""
    with pytest.raises(AdapterFileError) as failure:
        load_adapter(path)
    message = str(failure.value)
    assert message.startswith(f"'{path.name}'") and message.count(". ") + message.count(": ") >= 1
    return message


def test_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.safetensors"
    path.touch()
    assert "is empty" in refused(path)


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 200, 0.5, 0.9, -1])
def test_truncated_file_is_refused(tmp_path, whole, kept):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert "is truncated or damaged" in refused(path)


def test_file_with_something_behind_it_is_refused(tmp_path, whole):
    path = tmp_path / "long.safetensors"
    path.write_bytes(whole + b"\0")
    assert "is truncated or damaged" in refused(path)


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.folder),))

    def __init__(self, folder: Path) -> None:
        self.folder = folder


@pytest.mark.parametrize("kind", ["torch zip", "torch legacy", 2, 3, 4, 5])
def test_pickled_file_is_refused_unopened(tmp_path, kind):
    path = tmp_path / "bomb.safetensors"
    bomb = Bomb(tmp_path / "exploded")
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps(bomb, protocol=kind))
    else:
        torch.save({"lora": bomb}, path, _use_new_zipfile_serialization=kind == "torch zip")
    assert "is a pickled file" in refused(path)
    assert not bomb.folder.exists()


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "notes.safetensors"
    path.write_text("these are my notes, and no tensors\n" * 10)
    assert "is truncated or damaged" in refused(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"modelspec.architecture": "sdxl/lora"}])
def test_safetensors_of_another_program_is_refused(tmp_path, metadata):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid.lora_up.weight": torch.ones(2, 2)}, path, metadata=metadata)
    assert "is a safetensors file but not an SA-Inject adapter" in refused(path)


def test_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_adapter(tmp_path / "none.safetensors")


@pytest.mark.parametrize("version", ["2", "0", None])
def test_other_version_is_refused(tmp_path, whole, version):
    message = refused(rewritten(tmp_path, whole, metadata={"format_version": version}))
    assert f"has adapter format version {version or 'none'}; this pack reads version 1" in message


def rewritten(
    folder: Path, whole: bytes, tensors: dict[str, Tensor | None] | None = None, metadata: dict | None = None
) -> Path:
    """The whole file with some entries changed, or taken out (None)."""
    path = folder / "bad.safetensors"
    path.write_bytes(whole)
    old_tensors, old_metadata = contents(path)
    new_tensors = {k: v for k, v in (old_tensors | (tensors or {})).items() if v is not None}
    new_metadata = {k: v for k, v in (old_metadata | (metadata or {})).items() if v is not None}
    save_file(new_tensors, path, metadata=new_metadata)
    return path


BAD_TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing matrix": ({FIRST_B: None}, f"lacks {FIRST_B}. "),
    "missing text": ({"reference_text.cross_attn": None}, "lacks reference_text.cross_attn. "),
    "missing tokens": (
        {"token_embedding.clip_l": None, "token_embedding.clip_g": None},
        "lacks token_embedding.<encoder>. ",
    ),
    "two missing": ({FIRST_B: None, FIRST_B.replace("to_k", "to_v"): None}, f"lacks {FIRST_B} and 1 more. "),
    "surplus": ({"lora_te.weight": torch.ones(2)}, "holds lora_te.weight, which an adapter of format 1 does not have"),
    "misshapen": ({FIRST_B: torch.ones(8, 4)}, f"{FIRST_B} has shape (8, 4), expected (8, 3)"),
    "token without vectors": ({"token_embedding.clip_l": torch.tensor(1.0)}, "clip_l has 0 dimensions, expected 2"),
    "flat text": ({"reference_text.cross_attn": torch.ones(8)}, "cross_attn has 1 dimensions, expected 3"),
    "NaN in a matrix": ({FIRST_B: torch.full((8, 3), torch.nan)}, f"holds NaN or infinite values in {FIRST_B}"),
    "infinity in a token": (
        {"token_embedding.clip_g": torch.full((1, 12), torch.inf)},
        "holds NaN or infinite values in token_embedding.clip_g",
    ),
    "NaN in the text": (
        {"reference_text.cross_attn": torch.full((1, 5, 8), torch.nan)},
        "holds NaN or infinite values in reference_text.cross_attn",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensor_is_refused_by_its_key(tmp_path, whole, case):
    changes, said = BAD_TENSORS[case]
    assert said in refused(rewritten(tmp_path, whole, tensors=changes))


ENTRIES = ("architecture", "blocks", "rank", "alpha", "reference_mode", "placeholder", "class_word", "training")


@pytest.mark.parametrize("entry", ENTRIES)
def test_missing_metadata_is_refused_by_its_name(tmp_path, whole, entry):
    message = refused(rewritten(tmp_path, whole, metadata={entry: None}))
    assert f"lacks the metadata entry '{entry}'" in message


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("rank", "three"),
        ("alpha", ""),
        ("reference_mode", "sideways"),
        ("training", "{"),
        ("blocks", "[[1, 2]]"),
        ("blocks", "7"),
        ("blocks", "[]"),
        ("rank", "0"),
        ("rank", "999999999"),
        ("alpha", "nan"),
        ("alpha", "-1"),
    ],
)
def test_unreadable_metadata_is_refused(tmp_path, whole, entry, value):
    assert "has unreadable metadata (" in refused(rewritten(tmp_path, whole, metadata={entry: value}))


def test_atomic_write_rewritten_without_a_change_is_accepted(tmp_path, whole, adapter):
    """What the refusals above rest on."""
    assert load_adapter(rewritten(tmp_path, whole)).info == adapter.info


# --- Writes that fail


def fails_half_way(error: BaseException) -> Callable:
    def write(tensors: dict, file: str, metadata: dict) -> None:
        Path(file).write_bytes(b"half an adapter")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError("No space left on device"), OSError),
        (SafetensorError("I/O error: No space left on device"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("older", [False, True], ids=["no file before", "a file before"])
def test_failing_write_leaves_what_was_there(tmp_path, monkeypatch, whole, adapter, error, seen, older):
    path = tmp_path / "a.safetensors"
    if older:
        path.write_bytes(whole)
    before = files_in(tmp_path)
    monkeypatch.setattr(adapter_file, "save_file", fails_half_way(error))
    with pytest.raises(seen, match="No space left" if seen is OSError else None):
        save_adapter(adapter, path)
    assert files_in(tmp_path) == before


def test_disk_without_room_leaves_what_was_there(tmp_path, whole, adapter):
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole)
    with no_file_longer_than(len(whole) // 2), pytest.raises(OSError):
        save_adapter(adapter, path)
    assert files_in(tmp_path) == {"a.safetensors": whole}


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_name_that_is_taken_by_a_folder_leaves_no_temporary_file(tmp_path, adapter):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError):
        save_adapter(adapter, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_folder_that_cannot_be_made_is_an_os_error(tmp_path, adapter):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(OSError):
        save_adapter(adapter, tmp_path / "file" / "a.safetensors")
    assert files_in(tmp_path) == {"file": b"in the way"}


def test_new_file_takes_the_place_of_the_older(tmp_path, adapter):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"older")
    save_adapter(adapter, path)
    assert load_adapter(path).info == adapter.info
    assert list(files_in(tmp_path)) == ["a.safetensors"]


# --- Which file holds an adapter


def test_file_holds_the_adapter_that_was_saved_whatever_else_it_says(tmp_path, adapter):
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path, {"workflow": "another", "date": "today"})
    assert holds_adapter(path, adapter) and holds_adapter(path, load_adapter(path))


def test_file_that_differs_in_anything_does_not_hold_it(tmp_path, adapter, whole):
    path = tmp_path / "a.safetensors"
    tensors, metadata = read_bytes(whole, path)
    for key in tensors:
        changed = {**tensors, key: tensors[key].clone()}
        changed[key].flatten()[0] += 0.5
        save_file(changed, path, metadata=metadata)
        assert not holds_adapter(path, adapter), key
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, path, metadata=metadata)
        assert not holds_adapter(path, adapter), key
    for key in ("alpha", "placeholder", "training", "blocks", "reference_mode", "format_version"):
        save_file(tensors, path, metadata={**metadata, key: metadata[key] + " "})
        assert not holds_adapter(path, adapter), key
    save_file({**tensors, "more": torch.ones(1)}, path, metadata=metadata)
    assert not holds_adapter(path, adapter)
    save_file({key: tensor.float() for key, tensor in tensors.items()}, path, metadata=metadata)
    assert not holds_adapter(path, adapter)


def read_bytes(whole: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path.write_bytes(whole)
    return contents(path)


def test_file_that_is_no_adapter_does_not_hold_it(tmp_path, adapter, whole):
    path = tmp_path / "a.safetensors"
    assert not holds_adapter(path, adapter)
    for content in (b"", b"text", whole[:100], whole[:-1]):
        path.write_bytes(content)
        assert not holds_adapter(path, adapter)
    path.unlink()
    path.mkdir()
    assert not holds_adapter(path, adapter)
    other = tmp_path / "b.safetensors"
    save_file({"lora_unet_mid.alpha": torch.ones(1)}, other)
    assert not holds_adapter(other, adapter)


def test_a_class_word_that_was_encoded_on_another_device_is_the_same(tmp_path, adapter, whole):
    path = tmp_path / "a.safetensors"
    tensors, metadata = read_bytes(whole, path)
    text = tensors["reference_text.cross_attn"]
    save_file({**tensors, "reference_text.cross_attn": text * (1 + 2**-10)}, path, metadata=metadata)
    assert not torch.equal(contents(path)[0]["reference_text.cross_attn"], text)
    assert holds_adapter(path, adapter)


def test_size_of_a_file_is_known_before_it_is_written(adapter, whole):
    expected = adapter_bytes(adapter.info.layers, adapter.info.rank)
    assert len(whole) < expected < len(whole) + 2**20
