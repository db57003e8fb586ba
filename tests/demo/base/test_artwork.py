"""The catalogue separates base and held-out objects, and every drawing in it is available."""

import io
import subprocess
import tarfile

import pytest
from PIL import Image

from sa_inject.demo.base import artwork as module
from sa_inject.demo.base.artwork import catalogue, drawing, find, objects, user_cache

BASE, HELD_OUT = objects("base"), objects("held_out")


def test_the_catalogue_has_as_many_objects_as_training_and_measuring_want():
    assert len(BASE) >= 96
    assert len(HELD_OUT) >= 60
    assert len(BASE) + len(HELD_OUT) == len(catalogue())


def test_twenty_held_out_objects_are_by_a_vendor_whose_hand_the_base_never_sees():
    vendors = {artwork.vendor for artwork in BASE}
    assert len([artwork for artwork in HELD_OUT if artwork.vendor not in vendors]) >= 20


def test_no_word_and_no_drawing_is_there_twice():
    """So nothing that is held out is among the base objects either, not even in the other vendor's hand."""
    assert len({artwork.word for artwork in catalogue()}) == len(catalogue())
    assert len({artwork.file for artwork in catalogue()}) == len(catalogue())


def test_no_object_is_called_by_a_class_word():
    """ "animal" must stay the word for all of them."""
    assert {artwork.word for artwork in catalogue()} & {artwork.class_word for artwork in catalogue()} == set()


def test_the_base_learns_every_class_word_that_a_subject_needs():
    assert {artwork.class_word for artwork in HELD_OUT} <= {artwork.class_word for artwork in BASE}


def test_an_object_is_found_by_its_word():
    assert (find("robot").split, find("robot").class_word) == ("held_out", "toy")


def test_an_unknown_word_is_named_and_so_is_the_list_of_known_ones():
    with pytest.raises(ValueError, match="'unheard-of'.*objects.csv"):
        find("unheard-of")


@pytest.mark.usefixtures("artwork")
def test_every_drawing_is_there_and_cropped_to_what_is_visible():
    for artwork in catalogue():
        picture = drawing(artwork)
        visible = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16))
        assert picture.mode == "RGBA" and max(picture.size) > 48, artwork
        assert visible.getbbox() == (0, 0, *picture.size), artwork
        assert visible.histogram()[255] > 0.1 * picture.width * picture.height, artwork


@pytest.mark.usefixtures("artwork")
def test_no_two_objects_look_the_same():
    assert len({(drawing(a).size, drawing(a).tobytes()) for a in catalogue()}) == len(catalogue())


def write_archive(path, pictures: dict[str, Image.Image]) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, picture in pictures.items():
            data = io.BytesIO()
            picture.save(data, "PNG")
            member = tarfile.TarInfo(f"package/{name}")
            member.size = data.tell()
            data.seek(0)
            archive.addfile(member, data)


def test_of_an_archive_only_the_64_px_drawings_of_the_catalogue_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = {f"{artwork.file}.png" for artwork in catalogue() if artwork.vendor == "twitter"}
    right, wrong = Image.new("RGBA", (64, 64), "red"), Image.new("RGBA", (64, 64), "blue")
    pictures = {f"img/twitter/64/{name}": right for name in wanted} | {"img/twitter/64/other.png": wrong}
    pictures |= {f"img/twitter/sheets/{name}": wrong for name in wanted}
    write_archive(user_cache() / "artwork" / "emoji-datasource-twitter-16.0.0.tgz", pictures)
    folder = module._drawings.__wrapped__("twitter")
    assert {path.name for path in folder.iterdir()} == wanted
    assert all(Image.open(path).getpixel((0, 0)) == (255, 0, 0, 255) for path in folder.iterdir())


def test_without_npm_the_error_says_where_the_archive_would_have_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="npm.*emoji-datasource-google@16.0.0.*Install it") as failure:
        module._drawings.__wrapped__("google")
    assert str(tmp_path / "sa-inject" / "artwork" / "emoji-datasource-google-16.0.0.tgz") in str(failure.value)


def test_a_download_that_breaks_off_leaves_no_archive_that_is_taken_for_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\nprintf half > "$5/emoji-datasource-google-16.0.0.tgz"\nexit 1\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(subprocess.CalledProcessError):
        module._drawings.__wrapped__("google")
    assert not list((tmp_path / "cache").rglob("*.tgz"))
