"""A file is complete or not there."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sa_inject.core.atomic_write import ABANDONED_AFTER, NameTakenError, atomic_write

HOME = Path(__file__).parents[2] / "core"  # for processes that import atomic_write.py alone, which is quick


def test_takes_its_name_when_all_is_written_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "learned.bin"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == [path.name]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "learned.bin"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="half way"), atomic_write(path) as temporary:
        temporary.write_bytes(b"wh")
        raise ValueError("half way")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no such rights")
def test_others_may_read_it(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "learned.bin") as temporary:
        temporary.write_bytes(b"whole")
    assert stat.S_IMODE((tmp_path / "learned.bin").stat().st_mode) == 0o644


def test_where_rights_cannot_be_set_the_file_is_written_all_the_same(tmp_path: Path, monkeypatch) -> None:
    """Network drives: CIFS, and NFS with another owner."""

    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    with atomic_write(tmp_path / "learned.bin") as temporary:
        temporary.write_bytes(b"whole")
    monkeypatch.undo()
    assert (tmp_path / "learned.bin").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["learned.bin"]


def no_hard_links(*names: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.fixture(params=["hard links", "no hard links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exFAT and some shared folders answer, too."""
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", no_hard_links)


def test_file_that_came_meanwhile_is_not_replaced(tmp_path: Path, file_system: None) -> None:
    path = tmp_path / "learned.bin"
    with pytest.raises(NameTakenError, match="learned.bin"), atomic_write(path, replace=False) as temporary:
        temporary.write_bytes(b"ours")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == [path.name]


def test_link_that_leads_nowhere_is_a_name_that_is_taken(tmp_path: Path, file_system: None) -> None:
    path = tmp_path / "learned.bin"
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(NameTakenError), atomic_write(path, replace=False) as temporary:
        temporary.write_bytes(b"ours")
    assert os.listdir(tmp_path) == [path.name]


def test_free_name_is_taken(tmp_path: Path, file_system: None) -> None:
    path = tmp_path / "new" / "learned.bin"
    with atomic_write(path, replace=False) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and path.stat().st_nlink == 1
    assert os.listdir(path.parent) == [path.name]


def test_name_is_free_again_when_the_file_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_hard_links)
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "learned.bin", replace=False) as temporary:
        monkeypatch.setattr(type(temporary), "chmod", lambda path, mode: path.unlink())
    assert os.listdir(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from atomic_write import NameTakenError, atomic_write
folder, own = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()  # all begin together
for number in range(200):
    try:
        with atomic_write(folder / str(number), replace=False) as temporary:
            temporary.write_text(own)
        print(number)
    except NameTakenError:
        pass
"""


def test_every_name_goes_to_one_of_several_processes(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), own], cwd=HOME, text=True, stdin=-1, stdout=subprocess.PIPE
        )
        for own in "abc"
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    won = {own: writer.communicate()[0].split() for own, writer in zip("abc", writers, strict=True)}
    assert sorted(number for numbers in won.values() for number in numbers) == sorted(map(str, range(200)))
    assert all((tmp_path / number).read_text() == own for own, numbers in won.items() for number in numbers)
    assert len(os.listdir(tmp_path)) == 200


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path) -> None:
    killed = (
        "import os; from pathlib import Path; from atomic_write import atomic_write\n"
        f"with atomic_write(Path({str(tmp_path / 'learned.bin')!r})) as file: file.write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", killed], cwd=HOME, check=False)
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in ("robot.safetensors.part", ".robot.part", "notes-abcdefgh.part")]
    for path in others:  # of other programs
        path.write_text("")
        os.utime(path, (0, 0))

    with atomic_write(tmp_path / "first.bin"):
        pass
    assert left.exists()  # it might still be written
    os.utime(left, (left.stat().st_atime, left.stat().st_mtime - ABANDONED_AFTER - 60))
    with atomic_write(tmp_path / "second.bin"):
        pass
    assert not left.exists() and all(path.exists() for path in others)
