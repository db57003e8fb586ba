"""What trainings of all networks share: learning rates over a run, and samples to look at."""

import pytest
from PIL import Image

from sa_inject.demo.base.artwork import objects
from sa_inject.demo.base.scenes import COLOURS, PATTERNS, SIDES, SIZES

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import learning

    return learning


# --- The learning rate


@pytest.mark.parametrize("total", [400, 2600])
def test_the_learning_rate_rises_stays_and_falls_to_nothing(module, total):
    factors = [module.learning_rate_factor(step, total) for step in range(total + 1)]
    fall = round(module.DECAY_SHARE * total)
    rise, plateau, decay = factors[: module.WARMUP], factors[module.WARMUP : total - fall], factors[total - fall :]
    assert 0 < rise[0] <= 1 / module.WARMUP and rise == sorted(rise) and rise[-1] == 1
    assert plateau and set(plateau) == {1.0}
    assert decay[0] == 1 and decay[-1] == 0
    steps = [before - after for before, after in zip(decay, decay[1:], strict=False)]
    assert steps == pytest.approx([1 / fall] * fall)


def test_a_run_shorter_than_the_warm_up_still_learns_at_every_step(module):
    assert all(0 < module.learning_rate_factor(step, 10) <= 1 for step in range(10))


# --- Samples


def test_sampled_captions_show_every_value_of_every_factor(module):
    captions = module.example_captions(16)
    assert len(set(captions)) == 16
    words = {word for caption in captions for word in caption.replace(",", "").split()}
    assert {*SIZES, *SIDES, *COLOURS, *PATTERNS} - {"plain"} <= words
    shown = {artwork.word for artwork in objects("base") if any(f" {artwork.word} " in text for text in captions)}
    assert len(shown) == 16


def test_a_grid_has_its_pictures_in_reading_order(module, tmp_path):
    colours = [(10 * i, 0, 255 - 10 * i) for i in range(11)]
    module.save_grid([Image.new("RGB", (16, 16), colour) for colour in colours], tmp_path / "grid.png", columns=4)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (64, 48)
    assert [grid.getpixel((i % 4 * 16 + 8, i // 4 * 16 + 8)) for i in range(11)] == colours
