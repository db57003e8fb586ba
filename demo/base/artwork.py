"""The emoji artwork that the demo's scenes are composed of, fetched once through npm into the user's cache folder.

Google's Noto drawings are Apache-2.0, Twitter's Twemoji are CC-BY 4.0; neither is kept in this repository.
"""

import csv
import os
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

PACKAGE: str = "emoji-datasource-{vendor}"
VERSION: str = "16.0.0"
OBJECTS: Path = Path(__file__).with_name("objects.csv")


class Artwork(NamedTuple):
    """One drawable object: the word captions use, its class, and where its drawing comes from."""

    split: str  # "base" or "held_out"
    word: str
    class_word: str
    vendor: str  # "google" (Noto) or "twitter" (Twemoji)
    file: str


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sa-inject"


@cache
def catalogue() -> tuple[Artwork, ...]:
    """Every object of the world, base objects first, in file order."""
    with OBJECTS.open(newline="") as lines:
        rows = csv.reader(lines)
        next(rows)
        return tuple(Artwork(*row) for row in rows)


def objects(split: str) -> tuple[Artwork, ...]:
    return tuple(artwork for artwork in catalogue() if artwork.split == split)


def find(word: str) -> Artwork:
    for artwork in catalogue():
        if artwork.word == word:
            return artwork
    raise ValueError(f"No object is called '{word}'; demo/base/objects.csv lists those there are.")


def _fetch(vendor: str, folder: Path) -> Path:
    """The vendor's npm archive, downloaded unless it is already in the cache."""
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
    missing = {f"{a.file}.png" for a in catalogue() if a.vendor == vendor and not (drawings / f"{a.file}.png").exists()}
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
def drawing(artwork: Artwork) -> Image.Image:
    """The object's RGBA drawing, cropped to what is visible."""
    image = Image.open(_drawings(artwork.vendor) / f"{artwork.file}.png").convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
