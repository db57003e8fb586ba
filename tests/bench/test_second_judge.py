"""The judge from ImageNet, the colour score, stored pictures for later judges, and the joint table."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, import_folder
from tests.imagenet_judge import embedder


class Pixels:
    """Judges by the pixels themselves."""

    def embed(self, images):
        pixels = torch.tensor(np.stack([np.asarray(image).ravel() for image in images]), dtype=torch.float32)
        return torch.nn.functional.normalize(pixels, dim=1)


@pytest.fixture(scope="module")
def second(comfyui):
    if "demo" not in sys.modules:
        import_folder("demo", ROOT / "demo")
    from bench.quality import second_judge

    return second_judge


@pytest.fixture(scope="module")
def subject(artwork, second):
    from bench.quality.subjects import make_subject, table_artworks

    return make_subject(table_artworks(1)[0], prompts=3)


def on_blue(colour: tuple[int, int, int], left: int = 20) -> Image.Image:
    picture = Image.new("RGB", (128, 128), (48, 78, 186))
    picture.paste(colour, (left, 30, left + 50, 90))
    return picture


def test_colours_are_those_of_the_subject_wherever_it_is(second):
    red, moved, orange, green = (
        on_blue((220, 30, 30)),
        on_blue((220, 30, 30), 60),
        on_blue((225, 60, 30)),
        (20, 200, 30),
    )
    assert second.colour_likeness(red, moved) == pytest.approx(1.0)
    assert second.colour_likeness(red, on_blue(green)) < 0.1
    assert second.colour_likeness(red, on_blue(green)) < second.colour_likeness(red, orange) < 1


def test_where_nothing_stands_out_no_colour_is_like_it(second):
    assert second.colour_likeness(Image.new("RGB", (128, 128), (48, 78, 186)), on_blue((220, 30, 30))) == 0.0


def test_real_scenes_look_like_themselves_and_other_objects_do_not(second, subject):
    from bench.quality.subjects import make_subject, moved, table_artworks
    from demo.base.scenes import render

    other = make_subject(table_artworks(2)[1], prompts=3)
    real, nearly, foreign = (
        second.look(Pixels(), [render(scene) for scene in scenes], subject.prompts)
        for scenes in (subject.prompts, moved(subject.prompts), other.prompts)
    )
    assert real == pytest.approx((1.0, 1.0), abs=1e-4)
    assert real.imagenet > nearly.imagenet and nearly.colour > 0.9 > foreign.colour


def test_kept_pictures_can_be_judged_later_and_say_the_same(second, subject, tmp_path):
    from demo.base.scenes import render

    images = [render(scene) for scene in subject.prompts]
    images[0] = Image.new("RGB", images[0].size, "white")
    key = {"part": "main", "method": "ours", "subject": "a"}
    first, later = (second.SecondJudge(tmp_path / name, tmp_path / "drawn") for name in ("first", "later"))
    first._embedder = later._embedder = Pixels()
    first.add(key, images, subject.prompts)
    assert later.said_of({"key": key}) is None
    later.judge_kept({"key": key}, subject.prompts)
    said = [judge.said_of({"key": key}) for judge in (first, later)]
    assert said[0] == said[1] and said[0]["imagenet"] < 1
    later.judge_kept({"key": {"part": "other"}}, subject.prompts)
    assert later.said_of({"key": {"part": "other"}}) is None


def test_on_the_joint_scale_the_base_is_0_and_another_real_scene_1(second):
    from bench.quality.both_judges import CEILING, both_rows

    levels = {"base": (0.2, 0.4), CEILING: (0.9, 0.8), "ours": (0.55, 0.7), "not judged": None}
    results, said = [], {}
    for method, level in levels.items():
        for subject, extra in (("a", 0.0), ("b", 0.05)):
            result = {
                "key": {"method": method, "subject": subject},
                "scores": {"similarity": level[0] if level else 1.0},
            }
            results.append(result)
            said[id(result)] = {"imagenet": level[1] + extra, "colour": level[1]} if level else None
    rows = {row["method"]: row for row in both_rows(results, lambda result: said[id(result)])}
    assert rows.keys() == {"base", CEILING, "ours"}
    assert rows["base"]["imagenet, relative"].startswith("0.000") and rows[CEILING]["colour, relative"].startswith(
        "1.000"
    )
    assert rows["ours"]["similarity, relative"].startswith("0.500")
    assert rows["ours"]["imagenet, relative"].startswith("0.750") and rows["ours"]["imagenet"] == "0.725"


def test_the_judge_from_imagenet_is_told_what_nobody_may_learn_from(second):
    from demo.base.imagenet import JUDGE, Perception

    with pytest.raises(ValueError, match="nothing may learn from it"):
        Perception(JUDGE)


def test_the_judge_from_imagenet_finds_a_subject_again(second, subject):
    """In another place it is nearer than another object in the same. Without a network, this is not tested."""
    from demo.base import imagenet
    from demo.base.artwork import find
    from demo.base.scenes import render

    scene = subject.prompts[0]
    pictures = [scene, scene._replace(shift_x=0.04), scene._replace(artwork=find("guitar"))]
    here, moved, other = embedder(imagenet).embed([render(picture) for picture in pictures])
    assert here @ here == pytest.approx(1.0) and here @ moved > 0.7 > here @ other
