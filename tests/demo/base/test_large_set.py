"""The large set: its table keeps subjects unseen, its artwork is packed reproducibly, and its scenes show more."""

import io
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from sa_inject.demo.base import artwork as artwork_module
from sa_inject.demo.base import fetch_artwork
from sa_inject.demo.base import scenes as scenes_module
from sa_inject.demo.base.artwork import LARGE, SMALL, Artwork, catalogue, objects, packed_name
from sa_inject.demo.base.judge import measure, things
from sa_inject.demo.base.scenes import MEASURABLE, Scene, caption, random_large_scene, render

BASE, HELD_OUT = objects("base", LARGE), objects("held_out", LARGE)
EMOJI = Artwork("base", "lamp", "device", "google", "aaaa")
STAMP = Artwork("held_out", "vase", "thing", "tuxpaint", "things/vase")
OTHER = Artwork("base", "lamp", "device", "google", "bbbb")
SMALL_WORLD_HELD_OUT = objects("held_out", SMALL)


def test_the_base_has_six_hundred_objects_and_those_of_the_small_set_among_them():
    words = {artwork.word for artwork in BASE}
    assert len(words) >= 600
    assert {artwork.word for artwork in objects("base", SMALL)} <= words


def test_subjects_of_the_small_set_are_held_out_by_word_and_by_drawing():
    assert set(SMALL_WORLD_HELD_OUT) <= set(HELD_OUT)
    held_words, held_files = ({getattr(a, name) for a in HELD_OUT} for name in ("word", "file"))
    assert not held_words & {artwork.word for artwork in BASE}
    assert not held_files & {artwork.file for artwork in BASE}
    assert "twitter" not in {artwork.vendor for artwork in BASE}, "a hand that the base never sees"


LIKE_SUBJECTS = {
    "1f409": "a whole dragon",
    "26b1-fe0f": "an urn like the amphora",
    "animals/birds/gander": "a goose",
    "animals/mammals/aquatic/sea_lion": "like the seal",
    "animals/mammals/bears/toys/edward_bear": "a teddy bear",
    "animals/mammals/deer/wapiti": "like the moose",
    "clothes/t_sock": "a sock",
    "food/vegetables/pumpkin_small": "a pumpkin",
    "household/tools/toolbox": "a toolbox",
    "seasonal/christmas/Roast_turkey": "a turkey",
    "space/voyager2": "a satellite",
}


def test_what_is_like_a_subject_under_another_name_is_not_in_the_base():
    assert not LIKE_SUBJECTS.keys() & {artwork.file for artwork in BASE}


def test_no_drawing_is_there_twice_a_word_has_one_class_and_no_class_is_a_word():
    assert len({packed_name(artwork) for artwork in catalogue(LARGE)}) == len(catalogue(LARGE))
    classes = {(artwork.word, artwork.class_word) for artwork in catalogue(LARGE)}
    assert len(classes) == len({word for word, _ in classes}) == len(things(LARGE))
    assert not {word for word, _ in classes} & {class_word for _, class_word in classes}
    assert {artwork.class_word for artwork in HELD_OUT} <= {artwork.class_word for artwork in BASE}


def png(size: tuple[int, int], colour: str, margin: int = 0) -> bytes:
    image = Image.new("RGBA", (size[0] + 2 * margin, size[1] + 2 * margin))
    image.paste(colour, (margin, margin, size[0] + margin, size[1] + margin))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, for a set of three drawings."""
    monkeypatch.setenv("SA_INJECT_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch_artwork, "catalogue", lambda world: (EMOJI, STAMP, OTHER))
    for remembers in (artwork_module.drawing, artwork_module._packed):
        remembers.cache_clear()
    yield tmp_path
    for remembers in (artwork_module.drawing, artwork_module._packed):
        remembers.cache_clear()


@pytest.fixture
def downloads(cache):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not here")
    folder = cache / "downloads"
    stamps = cache / "deb"
    (stamps / "DEBIAN").mkdir(parents=True)
    (stamps / "DEBIAN" / "control").write_text(
        "Package: tuxpaint-stamps-default\nVersion: 1\nArchitecture: all\nMaintainer: nobody <a@b.c>\nDescription: x\n"
    )
    stamp = stamps / "usr/share/tuxpaint/stamps/things/vase.png"
    stamp.parent.mkdir(parents=True)
    stamp.write_bytes(png((300, 150), "green", margin=20))
    folder.mkdir()
    target = folder / "tuxpaint-stamps-default_1_all.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(stamps), str(target)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(folder / "emoji-datasource-google-16.0.0.tgz", "w:gz") as archive:
        for name, data in {
            "package/img/google/64/aaaa.png": png((40, 50), "red", margin=7),
            "package/img/google/64/bbbb.png": png((40, 50), "blue"),
            "package/img/google/sheets/aaaa.png": png((40, 50), "white"),
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder


def test_the_pack_holds_what_the_table_names_small_and_the_same_every_time(cache, downloads):
    path = fetch_artwork.make_pack(cache)
    first = path.read_bytes()
    lamp, vase = artwork_module.drawing(EMOJI), artwork_module.drawing(STAMP)
    assert lamp.size == (40, 50) and lamp.getpixel((0, 0)) == (255, 0, 0, 255)
    assert vase.size == (128, 64) and vase.getpixel((64, 32)) == (0, 128, 0, 255)
    path.unlink()
    assert fetch_artwork.make_pack(cache).read_bytes() == first


def test_a_drawing_that_an_archive_lacks_is_named(cache, downloads, monkeypatch):
    lost = EMOJI._replace(file="cccc")
    monkeypatch.setattr(fetch_artwork, "catalogue", lambda world: (EMOJI, lost))
    with pytest.raises(FileNotFoundError, match="google has no cccc"):
        fetch_artwork.make_pack(cache)


def test_without_the_program_that_fetches_the_error_says_where_the_archive_goes(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"npm is needed.*emoji-datasource-google.*downloads"):
        fetch_artwork.make_pack(cache)


def test_a_drawing_of_the_large_set_that_was_not_fetched_says_what_to_run(cache):
    with pytest.raises(FileNotFoundError, match="lamp.*demo.base.fetch_artwork"):
        artwork_module.drawing(EMOJI)


@pytest.fixture
def packed(cache, monkeypatch):
    """Three drawings, all that blurred backgrounds are made of."""
    pictures = {packed_name(EMOJI): png((40, 50), "red"), packed_name(OTHER): png((40, 50), "black")}
    fetch_artwork.write_pack(cache / artwork_module.PACK, pictures)
    monkeypatch.setattr(scenes_module, "objects", lambda split, name: (EMOJI, OTHER))


def test_large_scenes_show_every_drawing_some_pairs_and_all_backgrounds(packed):
    rng = np.random.RandomState(0)
    scenes = [random_large_scene(rng, (EMOJI, OTHER)) for _ in range(600)]
    assert {scene.artwork for scene in scenes} == {EMOJI, OTHER}
    assert {scene.pattern for scene in scenes} == set(scenes_module.LARGE_PATTERNS)
    pairs = [scene for scene in scenes if scene.is_pair]
    assert len(pairs) / 600 == pytest.approx(scenes_module.PAIR_SHARE, abs=0.03)
    assert {scene.size for scene in pairs} == {"small"}


def test_a_pair_is_the_same_drawing_on_either_side_and_the_caption_says_so(packed):
    scene = Scene(EMOJI, "small", "left", "cyan", "plain", is_pair=True)
    picture = np.asarray(render(scene)).astype(int)
    is_red = (np.abs(picture - (255, 0, 0)).sum(axis=2) < 60).sum(axis=0)
    assert is_red[:64].sum() > 300 and is_red[64:].sum() == pytest.approx(is_red[:64].sum(), rel=0.1)
    assert is_red[62:66].sum() == 0, "two of them, not one"
    said = {caption(scene, wording) for wording in range(5)}
    assert len(said) == 3 and all("lamp" in text and "cyan" in text for text in said)
    assert not said & {caption(scene._replace(is_pair=False), wording) for wording in range(5)}


@pytest.mark.parametrize("pattern", MEASURABLE)
def test_what_is_measured_in_a_scene_of_the_large_set_is_what_it_shows(packed, pattern):
    for colour in scenes_module.COLOURS:
        drawn = OTHER if colour == "red" else EMOJI
        scene = Scene(drawn, "large", "right", colour, pattern)
        assert measure(render(scene), MEASURABLE)[:4] == ("large", "right", colour, pattern)


def test_a_blurred_background_follows_from_its_number_and_keeps_its_colour(packed):
    first, again, other = (scenes_module.background("blue", "blurred", backdrop=number) for number in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    nearest = min(
        scenes_module.COLOURS, key=lambda name: np.abs(first.mean(axis=(0, 1)) - scenes_module.COLOURS[name]).sum()
    )
    assert nearest in ("blue", "purple", "gray")
    assert np.abs(np.diff(first.astype(int), axis=1)).max() < 12, "no edges"
