"""bfloat16 is used on processors that multiply in it."""

import pytest
import torch

from sa_inject.demo.base import precision


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2", torch.float32), ("avx2 avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16)],
)
def test_the_processor_decides(flags, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    precision.fast_type.cache_clear()
    try:
        assert precision.fast_type("cpu") == expected
        with precision.fast("cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
        assert precision.fast_type("cuda") == torch.bfloat16
    finally:
        precision.fast_type.cache_clear()


def test_where_the_processor_does_not_say_it_is_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "none")
    precision.fast_type.cache_clear()
    try:
        assert precision.fast_type("cpu") == torch.float32
    finally:
        precision.fast_type.cache_clear()
