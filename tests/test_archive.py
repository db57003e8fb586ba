"""What people download from the registry: the pack, its help and its workflows, and nothing of how it is made."""

import io
import subprocess
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"core", "trainer", "nodes", "web", "workflows", "locales"}
FILES = {"__init__.py", "headless.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE"}
LARGEST = 1_000_000


def listed(*arguments: str) -> set[str]:
    done = subprocess.run(["git", "ls-files", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("this is no checkout of git")
    return set(done.stdout.splitlines())


@pytest.fixture(scope="module")
def archive() -> list[str]:
    """The files that `comfy node pack` takes: those of git, without those of `.comfyignore`."""
    return sorted(listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore"))


def test_archive_holds_the_pack_and_nothing_else(archive):
    tops = {path.split("/")[0] for path in archive}
    assert tops <= FOLDERS | FILES, tops - FOLDERS - FILES
    assert FOLDERS <= tops and FILES - {"headless.py"} <= tops
    assert not [path for path in archive if "test" in path or "node_modules" in path]


def test_archive_holds_every_file_that_the_pack_needs(archive):
    for folder in FOLDERS:
        needed = {path for path in listed() if path.startswith(folder + "/")}
        assert needed <= set(archive)


def test_archive_stays_under_a_megabyte(archive):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for path in archive:
            if (ROOT / path).exists():
                made.write(ROOT / path, path)
    assert len(file.getvalue()) < LARGEST


def test_icon_and_banner_are_as_the_registry_wants_them():
    with Image.open(ROOT / "assets" / "icon.png") as icon:
        assert icon.width == icon.height <= 400
    with Image.open(ROOT / "assets" / "banner.png") as banner:
        assert banner.width * 9 == banner.height * 21
