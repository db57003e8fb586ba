"""A file that is whole or not there."""

import os
import stat
from pathlib import Path

import pytest

from sa_inject.core.whole_file import whole_file


def test_takes_its_name_when_all_is_written_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "learned.bin"
    with whole_file(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == [path.name]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "learned.bin"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="half way"), whole_file(path) as temporary:
        temporary.write_bytes(b"wh")
        raise ValueError("half way")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no such rights")
def test_others_may_read_it(tmp_path: Path) -> None:
    with whole_file(tmp_path / "learned.bin") as temporary:
        temporary.write_bytes(b"whole")
    assert stat.S_IMODE((tmp_path / "learned.bin").stat().st_mode) == 0o644


def test_where_rights_cannot_be_set_the_file_is_written_all_the_same(tmp_path: Path, monkeypatch) -> None:
    """Network drives: CIFS, and NFS with another owner."""

    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    with whole_file(tmp_path / "learned.bin") as temporary:
        temporary.write_bytes(b"whole")
    monkeypatch.undo()
    assert (tmp_path / "learned.bin").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["learned.bin"]
