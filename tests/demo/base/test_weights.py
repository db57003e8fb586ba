"""The shipped weights are read as they were written, and a damaged file is not used."""

import hashlib

import pytest
import torch

from sa_inject.demo.base.weights import read_parts, read_weights, write_weights

UNET = {"out.2.weight": torch.linspace(-1, 1, 24).view(2, 3, 4).transpose(0, 2), "out.2.bias": torch.tensor([0.1])}
AUTOENCODER = {"taesd_decoder.1.weight": torch.linspace(0, 9, 6)}


def test_what_is_read_is_what_was_written_in_float16_under_the_checkpoints_names(tmp_path):
    path = write_weights(UNET, AUTOENCODER, tmp_path / "weights.safetensors")
    expected = {f"model.diffusion_model.{name}": value.half() for name, value in UNET.items()}
    expected |= {f"first_stage_model.{name}": value.half() for name, value in AUTOENCODER.items()}
    found = read_weights(path)
    assert found.keys() == expected.keys()
    assert all(value.dtype == torch.float16 and torch.equal(value, expected[name]) for name, value in found.items())
    assert {file.name for file in tmp_path.iterdir()} == {"weights.safetensors", "weights.sha256"}


def test_the_parts_come_back_apart_in_float32_and_under_their_own_names(tmp_path):
    parts = read_parts(write_weights(UNET, AUTOENCODER, tmp_path / "weights.safetensors"))
    for found, expected in zip(parts, (UNET, AUTOENCODER), strict=True):
        assert found.keys() == expected.keys()
        assert all(value.dtype == torch.float32 for value in found.values())
        assert all(torch.equal(value, expected[name].half().float()) for name, value in found.items())


def test_the_checksum_is_the_files_in_the_form_that_sha256sum_checks(tmp_path):
    path = write_weights(UNET, AUTOENCODER, tmp_path / "weights.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "weights.sha256").read_text() == f"{digest}  weights.safetensors\n"


@pytest.mark.parametrize("damage", ["one bit", "cut short", "empty"])
def test_a_damaged_file_is_refused_by_name_and_with_both_checksums(tmp_path, damage):
    path = write_weights(UNET, AUTOENCODER, tmp_path / "weights.safetensors")
    whole = path.read_bytes()
    damaged = {"one bit": whole[:-1] + bytes([whole[-1] ^ 1]), "cut short": whole[:-8], "empty": b""}[damage]
    path.write_bytes(damaged)
    digests = [hashlib.sha256(data).hexdigest() for data in (damaged, whole)]
    with pytest.raises(ValueError, match=f"weights.safetensors is damaged.*{digests[0]}.*{digests[1]}.*Fetch it again"):
        read_weights(path)


@pytest.mark.parametrize("missing", ["weights.safetensors", "weights.sha256"])
def test_a_missing_file_is_named(tmp_path, missing):
    path = write_weights(UNET, AUTOENCODER, tmp_path / "weights.safetensors")
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing.*Fetch the repository again"):
        read_weights(path)
