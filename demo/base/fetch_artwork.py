"""Downloads the large set's artwork and packs the drawings of `objects_large.csv` into one file.

    python -m demo.base.fetch_artwork

Emoji come from npm, cut-outs of photographs from Debian's `tuxpaint-stamps-default` with apt-get, and models that are
drawn from eight sides from pip. If one of these is missing, put its archive into the `downloads` folder by hand. The
error names the archive. The file has 15 MB and is all that training needs, so it can be copied to an offline machine.
"""

import io
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from .artwork import LARGE, PACK, PACKAGE, VERSION, Artwork, cache_folder, catalogue, crop_to_visible, packed_name
from .meshes import Surface, load_urdf, picture, upright

log = logging.getLogger(__name__)

SIDE: int = 128  # maximum size of a drawing
STAMPS: str = "tuxpaint-stamps-default"
MODELS: str = "pybullet==3.2.7"
MODELS_WHEEL: tuple[str, ...] = ("--platform", "manylinux2014_x86_64", "--python-version", "3.9")
MODELS_FOLDER: str = "pybullet_data/"
STAMPS_FOLDER: str = "./usr/share/tuxpaint/stamps/"


def _download(command: list[str], pattern: str, folder: Path) -> Path:
    """The file that the command creates in an empty folder and that matches the pattern, unless it exists."""
    for archive in sorted(folder.glob(pattern)):
        return archive
    program = shutil.which(command[0])
    if program is None:
        raise RuntimeError(f"{command[0]} is needed to fetch {pattern}. Install it, or put the file into {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        subprocess.run([program, *command[1:]], cwd=unfinished, check=True, stdout=subprocess.DEVNULL)
        found = next(Path(unfinished).glob(pattern))
        return found.replace(folder / found.name)


def _emoji(vendor: str, artworks: Iterable[Artwork], downloads: Path) -> Iterator[tuple[Artwork, bytes]]:
    package = PACKAGE.format(vendor=vendor)
    archive = _download(["npm", "pack", f"{package}@{VERSION}", "--silent"], f"{package}-{VERSION}.tgz", downloads)
    wanted = {f"package/img/{vendor}/64/{artwork.file}.png": artwork for artwork in artworks}
    with tarfile.open(archive) as members:
        yield from _taken(members, wanted)


def _stamps(artworks: Iterable[Artwork], downloads: Path) -> Iterator[tuple[Artwork, bytes]]:
    archive = _download(["apt-get", "download", STAMPS], f"{STAMPS}_*.deb", downloads)
    wanted = {f"{STAMPS_FOLDER}{artwork.file}.png": artwork for artwork in artworks}
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as members,
    ):
        yield from _taken(members, wanted)


def _views(artworks: Iterable[Artwork], downloads: Path) -> Iterator[tuple[Artwork, bytes]]:
    """Models by name, with `@` and the angle of view. A `y` says that the second axis points up."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", MODELS]
    wheel = _download([*command, "--only-binary", ":all:", *MODELS_WHEEL], "pybullet-*.whl", downloads)
    with zipfile.ZipFile(wheel) as members:

        def read(path: str) -> bytes:
            return members.read(f"{MODELS_FOLDER}{path}")

        models: dict[str, list[Surface]] = {}
        for artwork in artworks:
            name, view = artwork.file.split("@")
            if name not in models:
                found = load_urdf(f"{name}.urdf", read)
                models = {name: upright(found) if view.endswith("y") else found}
            buffer = io.BytesIO()
            picture(models[name], float(view.rstrip("y"))).save(buffer, "PNG")
            yield artwork, buffer.getvalue()


def _taken(members: tarfile.TarFile, wanted: dict[str, Artwork]) -> Iterator[tuple[Artwork, bytes]]:
    for member in members:
        artwork = wanted.get(member.name)
        if artwork is not None:
            stream = members.extractfile(member)
            assert stream is not None
            yield artwork, stream.read()


def prepared(png: bytes) -> bytes:
    """Crop to the visible part and scale to at most SIDE. -> a PNG that depends on its pixels only"""
    image = crop_to_visible(Image.open(io.BytesIO(png)).convert("RGBA"))
    if max(image.size) > SIDE:
        scale = SIDE / max(image.size)
        size = tuple(max(1, round(length * scale)) for length in image.size)
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_pack(path: Path, pictures: dict[str, bytes]) -> None:
    """Sorted and without times, so that the same pictures give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with zipfile.ZipFile(unfinished, "w") as pack:
        for name in sorted(pictures):
            pack.writestr(zipfile.ZipInfo(name), pictures[name])
    unfinished.replace(path)


def make_pack(folder: Path) -> Path:
    """Fetch what the table names, and pack it into the folder."""
    downloads = folder / "downloads"
    by_vendor: dict[str, list[Artwork]] = {}
    for artwork in catalogue(LARGE):
        by_vendor.setdefault(artwork.vendor, []).append(artwork)
    pictures: dict[str, bytes] = {}
    for vendor, artworks in by_vendor.items():
        fetch = {"tuxpaint": _stamps, "pybullet": _views}.get(vendor) or partial(_emoji, vendor)
        for artwork, png in fetch(artworks, downloads):
            pictures[packed_name(artwork)] = prepared(png)
        missing = [artwork.file for artwork in artworks if packed_name(artwork) not in pictures]
        if missing:
            raise FileNotFoundError(
                f"The artwork by {vendor} has no {', '.join(missing)}. Was another version fetched?"
            )
        log.info("%s: %d drawings", vendor, len(artworks))
    path = folder / PACK
    write_pack(path, pictures)
    return path


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    path = make_pack(cache_folder())
    log.info("wrote %s, %.1f MB", path, path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
