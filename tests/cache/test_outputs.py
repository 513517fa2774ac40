"""Where results go: what is in the way is refused before the work, what is written is there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cache.errors import DiskSpaceError, OffloadError, OutputError
from cache.outputs import check_output, output, refusal


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(path: Path, text: bytes = b"new") -> None:
    with output(path) as file:
        file.write(text)


def test_a_file_is_put_in_place_whole(tmp_path: Path) -> None:
    path = tmp_path / "result"
    put(path, b"old")
    with output(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["result"]


def test_after_an_error_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "result"
    put(path, b"old")
    with pytest.raises(ZeroDivisionError), output(path) as file:
        file.write(b"new")
        _ = 1 // 0
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["result"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result"
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_size, path.exists())))
    put(path)
    assert synced == [(3, False)]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for there in (False, True):
        link, file = tmp_path / f"link {there}", tmp_path / "elsewhere" / f"file {there}"
        link.symlink_to(file)
        if there:
            file.write_bytes(b"old")
        put(link)
        assert link.is_symlink()
        assert file.read_bytes() == b"new"
    assert names(tmp_path / "elsewhere") == ["file False", "file True"]


@pytest.mark.parametrize("checked", [check_output, put], ids=["before", "after"])
def test_what_is_no_file_is_refused_and_stays(tmp_path: Path, checked: object) -> None:
    assert callable(checked)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    (tmp_path / "to nothing").symlink_to(tmp_path / "not there" / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"old")
    before = names(tmp_path)
    for name, said in {
        "pipe": "pipe is no regular file",
        "to pipe": "to pipe is no regular file",
        "loop": "loop is no regular file",
        "folder": "folder is a folder: name a file in it",
        "not there/file": "there is no folder .*not there: make it",
        "to nothing": "there is no folder .*not there: make it",
        "file/below": "file is no folder",
        "n" * 300: "cannot be written: file name too long",
    }.items():
        with pytest.raises(OutputError, match=said):
            checked(tmp_path / name)
    with pytest.raises(OutputError, match="/dev/null is no regular file"):
        checked(Path("/dev/null"))
    assert names(tmp_path) == before
    assert not (tmp_path / "pipe").is_file()


def test_what_may_not_be_written_is_refused_and_stays(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_bytes(b"old")
    file.chmod(0o444)
    if os.access(file, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OutputError, match="file may not be written to"):
        put(file)
    assert file.read_bytes() == b"old"
    for mode in (0o500, 0o000):
        folder.mkdir(mode)
        with pytest.raises(OutputError, match="result cannot be written: permission denied"):
            check_output(folder / "result")
        folder.rmdir()


def test_a_full_disk_is_told_by_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result"
    put(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError, match="result cannot be written: no space left on device: make room"):
        put(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EDQUOT, DiskSpaceError), (errno.EFBIG, DiskSpaceError), (errno.EIO, OutputError)]
)
def test_a_quota_is_no_room_and_a_broken_disk_is_something_else(number: int, kind: type[OffloadError]) -> None:
    assert type(refusal("result", OSError(number, os.strerror(number)))) is kind
