"""A trace that grows while a model runs, and outlives a kill."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from traces import batched_trace, random_trace, with_everything, writer_of

from cache.errors import DiskSpaceError, OutputError, TraceError
from cache.traces import tensorfile
from cache.traces.trace import Trace
from cache.traces.writer import TraceWriter, check_free, partial_folder, recover, remove_partial


@pytest.mark.parametrize("block", [1, 8 * 2**20])
def test_passes_become_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", block)
    monkeypatch.setattr("cache.traces.writer.BLOCK_BYTES", block)
    trace = with_everything()
    writer, rows = writer_of(trace, tmp_path / "t")
    for row in rows:
        writer.append(row)
    assert writer.kept_sequences == 0
    writer.keep()
    assert writer.kept_sequences == 4
    writer.finish()
    assert Trace.open(tmp_path / "t").fingerprint == trace.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_only_finished_sequences_are_kept(tmp_path: Path) -> None:
    trace = batched_trace()
    writer, rows = writer_of(trace, tmp_path / "t")
    for row in rows[:5]:  # the batch of three
        writer.append(row)
    writer.keep()
    for row in rows[5:-1]:
        writer.append(row)
    writer.drop()
    for row in rows[5:-1]:  # once more, and cut short again
        writer.append(row)
    writer.finish()
    assert Trace.open(tmp_path / "t").fingerprint == trace.select(range(3)).fingerprint


def test_nothing_finished_is_no_trace(tmp_path: Path) -> None:
    writer, rows = writer_of(random_trace(), tmp_path / "t")
    writer.append(rows[0])
    writer.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tail", ["", '{"rows": 29, "sequ'])
@pytest.mark.parametrize("make", [batched_trace, with_everything])
def test_a_killed_recording_is_recovered(tmp_path: Path, make: Callable[[], Trace], tail: str) -> None:
    trace = make()
    writer, rows = writer_of(trace, tmp_path / "t")
    for row in rows[:5]:
        writer.append(row)
    writer.keep()
    for row in rows[5:]:
        writer.append(row)
    with pytest.raises(TraceError, match="offload trace recover"):
        TraceWriter(tmp_path / "t", trace.metadata, scores=False)
    # What lies on disk now is what a killed process would leave; what is buffered is lost.
    shutil.copytree(partial_folder(tmp_path / "t"), partial_folder(tmp_path / "killed"))
    writer.discard()
    with (partial_folder(tmp_path / "killed") / "journal.jsonl").open("a") as journal:
        journal.write(tail)
    assert recover(tmp_path / "killed") == 3
    assert Trace.open(tmp_path / "killed").fingerprint == trace.select(range(3)).fingerprint
    assert not partial_folder(tmp_path / "killed").exists()
    with pytest.raises(TraceError, match="was interrupted: there is no"):
        recover(tmp_path / "killed")


def test_what_cannot_be_recovered(tmp_path: Path) -> None:
    writer, rows = writer_of(random_trace(), tmp_path / "t")
    writer.append(rows[0])
    folder = partial_folder(tmp_path / "t")
    with pytest.raises(TraceError, match="no finished sequence"):
        recover(tmp_path / "t")
    writer.keep()
    (folder / "experts").write_bytes(b"")
    with pytest.raises(TraceError, match=re.escape("experts has 0 bytes")):
        recover(tmp_path / "t")
    for text in ("nonsense\n", "[" * 10**5 + "\n"):
        (folder / "journal.jsonl").write_text(text)
        with pytest.raises(TraceError, match="damaged"):
            recover(tmp_path / "t")
    writer.discard()
    assert not folder.exists()


def test_a_pipe_or_a_folder_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="pipe is no regular file"):
            check_free(tmp_path / "pipe", overwrite=overwrite)
        with pytest.raises(OutputError, match="folder is a folder"):
            check_free(tmp_path / "folder", overwrite=overwrite)
    remove_partial(tmp_path / "not there")


def test_what_no_recording_left_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "t.partial").mkdir()
    check_free(tmp_path / "t", overwrite=True)  # a recording that was killed at once
    (tmp_path / "t.partial" / "letters").touch()
    (tmp_path / "u.partial").touch()
    for name in ("t", "u"):
        with pytest.raises(TraceError, match=f"{name}.partial is in the way"):
            check_free(tmp_path / name, overwrite=True)
        remove_partial(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["letters", "t.partial", "u.partial"]


def test_a_recording_beside_a_link_is_one_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "t")
    writer, rows = writer_of(random_trace(), tmp_path / "link")
    writer.append(rows[0])
    with pytest.raises(TraceError, match=r"t\.partial holds an interrupted recording"):
        check_free(tmp_path / "t")
    writer.keep()
    writer.finish()
    assert (tmp_path / "link").is_symlink()
    assert Trace.open(tmp_path / "t").num_tokens


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_loses_no_finished_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, rows = writer_of(random_trace(), tmp_path / "t")
    writer.append(rows[0])
    writer.keep()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskSpaceError, match=r"t cannot be written: no space .* `offload trace recover .*t` then"):
            writer.finish()
    assert not (tmp_path / "t").exists()
    recover(tmp_path / "t")
    assert Trace.open(tmp_path / "t").num_tokens


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing_where_nothing_was_finished(tmp_path: Path) -> None:
    writer, rows = writer_of(random_trace(), tmp_path / "t")
    with Path("/dev/full").open("wb", buffering=0) as disk:
        for file in writer._files.values():
            os.dup2(disk.fileno(), file.fileno())
    writer.append(rows[0])
    with pytest.raises(DiskSpaceError, match="t cannot be written: no space left on device: make room"):
        writer.keep()
    with pytest.raises(DiskSpaceError):
        writer.finish()
    assert list(tmp_path.iterdir()) == []
