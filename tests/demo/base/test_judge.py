"""The judge recognises real scenes, and finds the wrong factor in a wrong picture."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sa_inject.demo.base import judge as judge_module
from sa_inject.demo.base.artwork import catalogue, find
from sa_inject.demo.base.judge import Judge, Verdict, check, crop_to_object, measure
from sa_inject.demo.base.scenes import COLOURS, PATTERNS, SIDES, SIZES, Scene, background, box, random_scene, render

pytestmark = pytest.mark.usefixtures("artwork")

SCENE = Scene(find("guitar"), "large", "left", "red", "striped")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("colour", COLOURS)
def test_what_is_measured_in_a_real_scene_is_what_it_shows(colour, pattern):
    rng = np.random.RandomState(4)
    for size, side, _ in itertools.product(SIZES, SIDES, range(2)):
        scene = random_scene(rng, catalogue())._replace(size=size, side=side, colour=colour, pattern=pattern)
        assert measure(render(scene))[:4] == (size, side, colour, pattern), scene


def test_the_object_is_found_where_it_was_drawn():
    rng = np.random.RandomState(5)
    missed = []
    for artwork in catalogue():
        scene = random_scene(rng, (artwork,))
        missed.append(np.abs(np.array(measure(render(scene)).box) - np.clip(box(scene), 0, 128)).max())
    assert np.quantile(missed, 0.9) <= 4  # pixels; an edge in the colour of the background may go unseen


@pytest.mark.parametrize("pattern", PATTERNS)
def test_where_nothing_stands_out_the_background_is_still_told(pattern):
    seen = measure(Image.fromarray(background("pink", pattern)))
    assert (seen.colour, seen.pattern, seen.box) == ("pink", pattern, (0, 0, 128, 128))


def test_a_crop_shows_the_object_alone_even_at_the_pictures_edge():
    """Centred, with background on each side, and nothing but the edge's colour from beyond it."""
    picture = Image.new("RGB", (128, 128), "white")
    picture.paste((255, 0, 0), (88, 40, 128, 80))
    crop = np.asarray(crop_to_object(picture, (88, 40, 128, 80)))
    is_red = crop[..., 1] < 128
    assert is_red[24, 24:].all() and not is_red[24, :3].any()  # the object touches the right edge, which goes on
    assert not is_red[:3].any() and not is_red[-3:].any()


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The one that is shipped."""
    return Judge()


def test_the_shipped_judge_knows_nearly_every_object_in_scenes_that_it_never_saw(judge):
    """And measures all else in them."""
    agreed = check(judge, count=120)
    assert agreed.pop("identity") >= 0.97
    assert min(agreed.values()) >= 0.99


def test_an_object_is_nearer_to_itself_in_another_scene_than_to_another_in_the_same(judge):
    """Subjects too, which the base model never saw. Embeddings have length one."""
    other_scene = SCENE._replace(size="small", side="right", colour="yellow", pattern="plain")
    robot = SCENE._replace(artwork=find("robot"))
    pictures = [render(robot), render(other_scene._replace(artwork=find("robot"))), render(SCENE)]
    first, again, guitar = judge.embed(pictures)
    assert torch.stack([first, again, guitar]).norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert first @ again > 0.7 > 0.5 > first @ guitar


def test_the_object_whose_direction_is_nearest_is_ranked_first_of_all(judge):
    guitar, robot = judge.rank([render(SCENE), render(SCENE._replace(artwork=find("robot")))])
    assert (guitar[0].word, robot[0].word) == ("guitar", "robot")
    assert set(guitar) == set(catalogue())


def test_a_picture_of_its_scene_is_right_in_everything(judge):
    assert judge.verdicts([render(SCENE)], [SCENE]) == [Verdict(True, True, True, True, True)]


@pytest.mark.parametrize(
    ("wrong", "factor"),
    [
        ("small", "size"),
        ("right", "side"),
        ("blue", "colour"),
        ("dotted", "pattern"),
        ("plain", "pattern"),
    ],
)
def test_a_picture_that_is_wrong_in_one_factor_fails_that_one_alone(judge, wrong, factor):
    (verdict,) = judge.verdicts([render(SCENE)], [SCENE._replace(**{factor: wrong})])
    assert verdict == Verdict(True, True, True, True, True)._replace(**{factor: False})


def test_a_picture_of_another_object_fails_the_identity_alone(judge):
    (verdict,) = judge.verdicts([render(SCENE._replace(artwork=find("robot")))], [SCENE])
    assert verdict == Verdict(False, True, True, True, True)


def test_a_judge_without_its_weights_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="demo.base.judge train"):
        Judge(tmp_path / "none.pt")


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "BATCH", 2)
    judge_module.train_identity(tmp_path / "whole.safetensors", steps=3)
    monkeypatch.setattr(judge_module, "SAVE_SECONDS", 0)
    view, views = judge_module._view, []

    def interrupted(*arguments):
        views.append(arguments)
        if len(views) > 2 * 2:  # in the third step
            raise KeyboardInterrupt
        return view(*arguments)

    monkeypatch.setattr(judge_module, "_view", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge_module.train_identity(tmp_path / "paused.safetensors", steps=3)
    assert not (tmp_path / "paused.safetensors").exists()
    monkeypatch.setattr(judge_module, "_view", view)
    judge_module.train_identity(tmp_path / "paused.safetensors", steps=3)
    whole, paused = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "paused"))
    assert all(torch.equal(value, paused[name]) for name, value in whole.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["paused.safetensors", "whole.safetensors"]
