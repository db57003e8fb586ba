"""bfloat16 is used on processors that multiply in it."""

import pytest
import torch

from sa_inject.demo.base import precision


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2", torch.float32), ("avx2 avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16)],
)
def test_the_processor_decides(flags, expected, processor):
    processor(flags)
    assert precision.fast_type("cpu") == expected
    with precision.fast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert precision.fast_type("cuda") == torch.bfloat16


def test_where_the_processor_does_not_say_it_is_float32(processor):
    processor(None)
    assert precision.fast_type("cpu") == torch.float32
