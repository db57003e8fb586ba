"""Sets of many pictures: what does not fit into memory lies on disk, and no picture is kept once it is encoded."""

import gc
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.host.test_train import pictures as small_pictures

pytestmark = pytest.mark.usefixtures("pack_nodes")


class Drawn(Sequence):
    """Pictures that are drawn when they are asked for. `most` is how many of them were alive at once."""

    def __init__(self, count: int, side: int = 64) -> None:
        self._count, self._side = count, side
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> torch.Tensor:
        if not 0 <= place < self._count:
            raise IndexError(place)
        coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(place))
        picture = torch.nn.functional.interpolate(coarse, (self._side, self._side), mode="nearest")
        self.alive.add(picture)
        self.most = max(self.most, len(self.alive))
        return picture


@pytest.fixture(scope="module")
def learned_from(load_checkpoint):
    model, _, vae = load_checkpoint("sd15")
    from sa_inject.nodes.host.learning.training_set import Subject, training_set
    from sa_inject.trainer.options import TrainOptions

    def build(pictures: Sequence[torch.Tensor], **options):
        subject = Subject(pictures, [None] * len(pictures), None, "sainj", "toy", 64)
        with torch.inference_mode():
            captions = [("a sainj toy",)] * len(pictures)
            return training_set(model, vae, subject, captions, 0, TrainOptions(**options))

    return build


def test_pictures_are_gone_once_they_are_encoded(learned_from):
    few, many = Drawn(3), Drawn(40)
    learned_from(few)
    data = learned_from(many)
    assert len(data.examples) == 40
    assert many.most <= few.most <= 3


@pytest.fixture
def small_memory(monkeypatch) -> None:
    """Room for the latents of three pictures of 64x64 pixels."""
    monkeypatch.setattr("sa_inject.nodes.host.learning.example_encoder.LATENT_BYTES", 3 * 4 * 8 * 8 * 4)


def in_memory(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of tensors that are not mapped from a file."""
    return sum(tensor.numel() * 4 for tensor in tensors if not is_mapped(tensor))


def is_mapped(tensor: torch.Tensor) -> bool:
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return "sa_inject-" in line
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to see what is mapped")
def test_three_hundred_pictures_take_the_memory_of_three(learned_from, small_memory, caplog):
    with caplog.at_level(logging.INFO):
        few, many = learned_from(Drawn(3)), learned_from(Drawn(300))
    sizes = [in_memory([example.latent for example in data.examples]) for data in (few, many)]
    assert sizes[0] == 3 * 1024 and sizes[1] <= 1.5 * sizes[0]
    assert "297 latents do not fit into" in caplog.text


def test_latents_on_disk_have_the_same_values_and_train_the_same(learned_from, small_memory, monkeypatch):
    options = {"horizontal_flips": True, "random_crops": 0.2, "color_jitter": 0.3}
    on_disk = learned_from(Drawn(5), **options)
    monkeypatch.undo()
    in_one = learned_from(Drawn(5), **options)
    for one, other in zip(on_disk.examples, in_one.examples, strict=True):
        assert torch.equal(one.latent, other.latent)
        for versions in ("as_target", "as_reference"):
            latents = [[version.latent for version in getattr(e, versions)] for e in (one, other)]
            assert len(latents[0]) > 1 and all(map(torch.equal, *latents))


def test_autograd_takes_latents_from_disk_without_a_copy(learned_from, small_memory):
    from sa_inject.nodes.host.learning.training_set import without_inference_tensors

    data = learned_from(Drawn(5))
    usable = without_inference_tensors(data)
    weight = torch.ones((), requires_grad=True)
    for example in usable.examples:
        (example.latent * weight).sum().backward()
    assert weight.grad is not None
    assert [one.latent is other.latent for one, other in zip(data.examples, usable.examples, strict=True)][3:] == [
        True
    ] * 2


def test_files_of_a_set_are_gone_when_it_is(learned_from, small_memory):
    import folder_paths

    folder = Path(folder_paths.get_temp_directory())
    data = learned_from(Drawn(6))
    left = [path for path in folder.glob("sa_inject-*.tensor")]
    assert os.name == "nt" or left == []
    first = data.examples[-1].latent.clone()
    gc.collect()
    assert torch.equal(data.examples[-1].latent, first)


def test_full_disk_keeps_latents_in_memory_and_tells(learned_from, small_memory, monkeypatch, caplog):
    def full(*args, **kwargs) -> Iterator:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    data = learned_from(Drawn(5))
    assert len(data.examples) == 5 and "No space left on device" in caplog.text


def test_a_set_on_disk_trains_the_adapter_of_one_in_memory(comfy_host, load_checkpoint, small_memory, monkeypatch):
    from tests.host.test_train import SMALL, Checkpoint

    checkpoint = Checkpoint(*load_checkpoint("sd15"))._asdict()

    def learned(name: str):
        inputs = {"images": small_pictures(5), **SMALL, "steps": 2, "file_name": name}
        return comfy_host.execute("TrainSAInjectAdapter", **checkpoint, **inputs)[0].lora.state_dict()

    on_disk = learned("on_disk")
    states = comfy_host.base / "models/sa_inject/training_states"
    for file in states.iterdir():
        file.unlink()  # so that it is trained again
    monkeypatch.undo()
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in learned("in_memory").items())


def test_large_folder_of_pictures_lies_on_disk(comfy_host, monkeypatch):
    from PIL import Image

    from sa_inject.nodes.host import dataset

    folder = comfy_host.base / "input/many"
    folder.mkdir(exist_ok=True)
    for number in range(6):
        Image.new("RGB", (32, 24), (40 * number, 10, 200)).save(folder / f"{number}.png")
    expected = dataset.read_dataset("many", "")
    monkeypatch.setattr(dataset, "PICTURE_BYTES", 32 * 24 * 4 * 4)  # of one picture and its mask
    found = dataset.read_dataset("many", "")
    assert all(map(torch.equal, found.images, expected.images)) and all(map(torch.equal, found.masks, expected.masks))
    if Path("/proc/self/maps").exists():
        assert [is_mapped(image) for image in found.images] == [False] + [True] * 5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to see the memory of a process")
def test_large_folder_leaves_nothing_in_memory_but_what_it_may(comfy_host, tmp_path, monkeypatch):
    from sa_inject.nodes.host import dataset

    monkeypatch.setattr(dataset, "PICTURE_BYTES", 2**24)
    for number in range(80):
        color = Image.new("RGB", (512, 512), (number, 90, 200))
        color.save(tmp_path / f"{number:02}.png")
    before = memory_of_this_process()
    found = dataset.read_folder(tmp_path, "many", "")
    assert sum(image.nbytes for image in found.images) >= 240 * 2**20
    assert memory_of_this_process() - before < 100 * 2**20


def memory_of_this_process() -> int:
    """Bytes that the operating system cannot free by itself, as it can mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
