"""The bench's table of sizes follows from the shapes that it says it follows from."""

import sys

import pytest

from tests.conftest import ROOT, import_folder

if "bench" not in sys.modules:
    import_folder("bench", ROOT / "bench")


def test_sizes_of_z_image_by_hand(comfy_host):
    from bench.memory.main import row_of

    row = row_of("Z-Image")
    tokens, width, layers, rank = 32 * 32, 3840, 32, 16
    assert row.bank == pytest.approx(2 * layers * tokens * (width + rank) / 2**30)
    assert row.bank_with_whole_values == pytest.approx(2 * layers * tokens * 2 * width / 2**30)
    assert row.weights == pytest.approx(11.5, abs=0.5)  # 6.15 thousand million parameters in bf16
    assert 0 < row.extra_work < 0.15
    assert row.weights + row.lora + row.kept_with_checkpointing == pytest.approx(row.training)
