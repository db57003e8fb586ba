"""The artwork of the demo's scenes: a table of objects for each of two sets ("worlds"), and the sources of drawings.

The small set's emoji are downloaded with npm into the user's cache folder. Google's Noto drawings are Apache-2.0,
Twitter's Twemoji are CC-BY 4.0. The large set is one file, which `fetch_artwork.py` makes. This repository contains no
drawing.
"""

import csv
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

PACKAGE: str = "emoji-datasource-{vendor}"
VERSION: str = "16.0.0"
SMALL, LARGE = "small", "large"  # names of the two sets, as in the option `--world`
SHIPPED: str = SMALL  # the set of the shipped weights and judge
OBJECTS: dict[str, Path] = {
    SMALL: Path(__file__).with_name("objects.csv"),
    LARGE: Path(__file__).with_name("objects_large.csv"),
}
PACK: str = "drawings.zip"


class Artwork(NamedTuple):
    """One drawing: its word in captions, the word's class, and its source.

    In the large set, several drawings may have the same word: by other vendors, or of the same object from other sides.
    """

    split: str  # "base" or "held_out"
    word: str
    class_word: str
    vendor: str  # "google" (Noto), "twitter" (Twemoji), "apple", "facebook", "tuxpaint" or "pybullet"
    file: str


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sa-inject"


def cache_folder() -> Path:
    """The folder for the large set's files: one in this repository that git ignores, or SA_INJECT_CACHE."""
    return Path(os.environ.get("SA_INJECT_CACHE") or Path(__file__).parents[1] / "cache")


@cache
def catalogue(world: str = SHIPPED) -> tuple[Artwork, ...]:
    """All drawings of a set, base objects first, in file order."""
    with OBJECTS[world].open(newline="") as lines:
        rows = csv.reader(lines)
        next(rows)
        return tuple(Artwork(*row) for row in rows)


def objects(split: str, world: str = SHIPPED) -> tuple[Artwork, ...]:
    return tuple(artwork for artwork in catalogue(world) if artwork.split == split)


def find(word: str, world: str = SHIPPED) -> Artwork:
    """The first drawing with this word. Raises ValueError."""
    for artwork in catalogue(world):
        if artwork.word == word:
            return artwork
    raise ValueError(f"No object is called '{word}'; demo/base/{OBJECTS[world].name} lists those there are.")


def _fetch(vendor: str, folder: Path) -> Path:
    """The vendor's npm archive, downloaded unless it is in the cache."""
    package = PACKAGE.format(vendor=vendor)
    archive = folder / f"{package}-{VERSION}.tgz"
    if archive.exists():
        return archive
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is needed to fetch {package}@{VERSION}. Install it, or put its archive at {archive}.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        command = [npm, "pack", f"{package}@{VERSION}", "--silent", "--pack-destination", unfinished]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (Path(unfinished) / archive.name).replace(archive)
    return archive


@cache
def _drawings(vendor: str) -> Path:
    """Folder with the vendor's 64 px drawings of the catalogue's objects."""
    folder = user_cache() / "artwork"
    drawings = folder / f"{vendor}-{VERSION}"
    missing = {
        f"{a.file}.png" for a in catalogue(SMALL) if a.vendor == vendor and not (drawings / f"{a.file}.png").exists()
    }
    if not missing:
        return drawings
    drawings.mkdir(parents=True, exist_ok=True)
    with tarfile.open(_fetch(vendor, folder)) as archive:
        for member in archive:
            path = Path(member.name)
            if path.name in missing and path.parent.name == "64":
                partial = drawings / f"{path.name}.{os.getpid()}"
                partial.write_bytes(archive.extractfile(member).read())
                partial.replace(drawings / path.name)
    return drawings


@cache
def views_of(artwork: Artwork) -> tuple[Artwork, ...]:
    """All drawings of the same object from other sides, or this drawing alone."""
    if artwork.vendor != "pybullet":
        return (artwork,)
    return tuple(other for other in catalogue(LARGE) if (other.vendor, other.word) == (artwork.vendor, artwork.word))


@cache
def _packed(path: Path) -> dict[str, bytes]:
    """The PNGs of the large set by name. None if they have not been fetched."""
    if not path.exists():
        return {}
    with zipfile.ZipFile(path) as pack:
        return {name: pack.read(name) for name in pack.namelist()}


def packed_name(artwork: Artwork) -> str:
    return f"{artwork.vendor}/{artwork.file}.png"


@cache
def drawing(artwork: Artwork) -> Image.Image:
    """The object's RGBA drawing, cropped to its visible part."""
    packed = _packed(cache_folder() / PACK).get(packed_name(artwork))
    if packed is not None:
        return Image.open(io.BytesIO(packed)).convert("RGBA")
    if artwork not in catalogue(SMALL):
        raise FileNotFoundError(f"No drawing of '{artwork.word}' here. Run `python -m demo.base.fetch_artwork`.")
    image = Image.open(_drawings(artwork.vendor) / f"{artwork.file}.png").convert("RGBA")
    return crop_to_visible(image)


def crop_to_visible(image: Image.Image) -> Image.Image:
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
