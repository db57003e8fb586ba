"""Files that no training wrote: each is refused with a reason, and none makes the reader use much memory."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sa_inject.core import adapter_file
from sa_inject.core.adapter_file import AdapterFileError, adapter_metadata, load_adapter, save_adapter
from tests import conftest
from tests.core.tiny_adapter import random_adapter

MUTATIONS = 400
NASTY: list[Any] = [
    -1,
    0,
    1,
    3,
    2**16,
    2**40,
    2**63,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    True,
    None,
    "",
    "8",
    " ",
    "\0",
    "input",
    "x" * 10_000,
    "forward",
    "..",
    "a.b",
    [],
    [[]],
    {},
    [1, 2, 3],
    {"a": [None]},
]

Header = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    save_adapter(random_adapter(pooled=True), path)
    return path.read_bytes()


def taken_apart(whole: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def put_together(header: Header, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


# --- the mutations; each changes one thing, which `chance` chooses


def some_bytes(file: bytes, chance: random.Random) -> bytes:
    changed = bytearray(file)
    for _ in range(chance.choice([1, 1, 2, 50])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def bytes_of_the_header(file: bytes, chance: random.Random) -> bytes:
    end = 8 + int.from_bytes(file[:8], "little")
    return some_bytes(file[:end], chance) + file[end:]


def length(file: bytes, chance: random.Random) -> bytes:
    cut = chance.randrange(len(file))
    return chance.choice([file[:cut], file + bytes(cut), file[:8] + file[cut:], file[cut:]])


def length_of_the_header(file: bytes, chance: random.Random) -> bytes:
    stated = chance.choice([0, 1, 2, 2**20, 2**32, 2**63 - 1, 2**64 - 1, chance.randrange(len(file))])
    return stated.to_bytes(8, "little") + file[8:]


def metadata(file: bytes, chance: random.Random) -> bytes:
    header, body = taken_apart(file)
    entries = header["__metadata__"]
    entry = chance.choice(sorted(entries))
    value = chance.choice(NASTY)
    entries[entry] = chance.choice([json.dumps(value), str(value), "[" * 100_000, value])
    return put_together(header, body)


def a_block(file: bytes, chance: random.Random) -> bytes:
    header, body = taken_apart(file)
    blocks = json.loads(header["__metadata__"]["blocks"])
    index = chance.randrange(len(blocks))
    change = chance.randrange(5)
    if change == 0:
        blocks[index] = chance.choice(NASTY)
    elif change == 1:
        blocks.append(chance.choice(blocks))
    elif change == 2:
        blocks.pop(index)
    else:
        blocks[index][chance.randrange(6)] = chance.choice(NASTY)
    header["__metadata__"]["blocks"] = json.dumps(blocks)
    return put_together(header, body)


def a_tensor(file: bytes, chance: random.Random) -> bytes:
    header, body = taken_apart(file)
    name = chance.choice(sorted(header))
    change = chance.randrange(5)
    if change == 0:
        del header[name]
    elif change == 1:
        header["renamed"] = header.pop(name)
    elif change == 2:
        header[name] = chance.choice(NASTY)
    elif name != "__metadata__":
        entry = chance.choice(["dtype", "shape", "data_offsets"])
        kinds = ["I64", "BOOL", "F8_E4M3", "F64", "F32"]
        numbers = [chance.choice([-1, 0, 1, 8, 2**40, 2**63]) for _ in range(chance.randrange(4))]
        header[name][entry] = chance.choice([*kinds, numbers, numbers, chance.choice(NASTY)])
    return put_together(header, body)


def numbers(file: bytes, chance: random.Random) -> bytes:
    header, body = taken_apart(file)
    return put_together(header, some_bytes(body, chance))


KINDS: list[Callable[[bytes, random.Random], bytes]] = [
    some_bytes,
    bytes_of_the_header,
    length,
    length_of_the_header,
    metadata,
    a_block,
    a_block,
    a_tensor,
    numbers,
]


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_file_is_read_or_refused_with_a_sentence(tmp_path, whole, seed):
    chance = random.Random(seed)
    refused = 0
    for number in range(MUTATIONS // 4):
        kind = KINDS[number % len(KINDS)]
        path = tmp_path / "changed.safetensors"
        path.write_bytes(kind(whole, chance))
        try:
            load_adapter(path)
        except AdapterFileError as error:
            assert str(error).startswith(f"'{path.name}'") and len(str(error)) < 800, (kind.__name__, number)
            refused += 1
        except Exception as error:
            pytest.fail(f"mutation {number} ({kind.__name__}): {error!r}")
        adapter_metadata(path)
    assert refused > MUTATIONS // 8  # or the mutations change nothing


BLOCK = ["input", 1, 0, "a.attn1", 8, 8]
SIZES: dict[str, list[Any]] = {
    "negative width": [[*BLOCK[:4], -8, 8]],
    "no width": [[*BLOCK[:4], 0, 8]],
    "width of 2^40": [[*BLOCK[:4], 8, 2**40]],
    "width as text": [[*BLOCK[:4], "8", 8]],
    "width that is no whole number": [[*BLOCK[:4], 8.0, 8]],
    "width that is a truth": [[*BLOCK[:4], True, 8]],
    "no path": [[*BLOCK[:3], "", 8, 8]],
    "path of dots": [[*BLOCK[:3], "a..attn1", 8, 8]],
    "path that is a number": [[*BLOCK[:3], 7, 8, 8]],
    "path that every module has": [[*BLOCK[:3], "a.forward", 8, 8]],
    "path inside another": [BLOCK, ["input", 2, 0, "a.attn1.to_k", 8, 8]],
    "path twice": [BLOCK, ["input", 2, 0, "a.attn1", 8, 8]],
    "place twice": [BLOCK, ["input", 1, 0, "b.attn1", 8, 8]],
    "unknown stage": [["side", *BLOCK[1:]]],
    "stage that is a list": [[["input"], *BLOCK[1:]]],
    "place as text": [["input", "1", *BLOCK[2:]]],
    "more layers than any UNet": [BLOCK] * 1001,
    "a layer that is text": ["attn1a"],
}


@pytest.mark.parametrize("case", SIZES)
def test_layers_that_no_unet_has_are_refused_before_anything_is_built(tmp_path, whole, monkeypatch, case):
    header, body = taken_apart(whole)
    header["__metadata__"]["blocks"] = json.dumps(SIZES[case])
    path = tmp_path / "bad.safetensors"
    path.write_bytes(put_together(header, body))
    monkeypatch.setattr(adapter_file, "SelfAttentionLoRA", lambda *_: pytest.fail("it was built"))
    with pytest.raises(AdapterFileError, match=r"unreadable metadata \(blocks"):
        load_adapter(path)


def test_nothing_is_built_that_the_file_does_not_hold(tmp_path, whole, monkeypatch):
    header, body = taken_apart(whole)
    header["__metadata__"]["rank"] = "1024"
    header["__metadata__"]["blocks"] = json.dumps([["input", n, 0, f"a{n}", 2**16, 2**16] for n in range(1000)])
    path = tmp_path / "greedy.safetensors"
    path.write_bytes(put_together(header, body))
    monkeypatch.setattr(adapter_file, "SelfAttentionLoRA", lambda *_: pytest.fail("it was built"))
    with pytest.raises(AdapterFileError, match="The file is incomplete"):
        load_adapter(path)


FOREIGN = """
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("outer_conftest", {conftest!r})
outer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(outer)
outer.import_folder("sa_inject", outer.ROOT)
from pathlib import Path
from sa_inject.core.adapter_file import AdapterFileError, load_adapter
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_adapter(Path({path!r}))
except AdapterFileError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes, and memory in kilobytes")
def test_of_a_file_of_others_the_header_alone_is_read(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    size = 2**31
    header = {"model.weight": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}
    path.write_bytes(put_together(header, b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    code = FOREIGN.format(conftest=conftest.__file__, path=str(path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    said, grown = run.stdout.splitlines()
    assert "not an SA-Inject adapter" in said
    assert int(grown) < 100_000


def test_metadata_come_from_the_header_and_from_our_files_only(tmp_path, whole):
    ours, other = tmp_path / "ours.safetensors", tmp_path / "other.safetensors"
    ours.write_bytes(whole)
    header, body = taken_apart(whole)
    other.write_bytes(put_together({**header, "__metadata__": {"format": "pt"}}, body))
    found = adapter_metadata(ours)
    assert found is not None and found["placeholder"] == "sks"
    assert adapter_metadata(other) is None
    other.write_text("no tensors at all")
    assert adapter_metadata(other) is None
    with pytest.raises(OSError):
        adapter_metadata(tmp_path / "missing.safetensors")


def test_whole_numbers_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_adapter(random_adapter(), tmp_path / "a.safetensors")
    metadata = adapter_metadata(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    whole_numbers = {key: tensor.to(torch.int32) for key, tensor in tensors.items()}
    save_file(whole_numbers, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(AdapterFileError, match="numbers of the type I32"):
        load_adapter(tmp_path / "a.safetensors")
