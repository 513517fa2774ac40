"""How a disk is measured, and what may go wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from slow_clock import SlowClock

from cache.errors import DiskSpaceError, ProfileError, TransferError
from offload.machine.budget import Budget
from offload.machine.disk import block_bytes_per_s, open_probe, slowdowns
from offload.store.files import FileReader


def test_blocks_are_read_by_as_many_threads_as_asked_and_failures_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "blocks"
    file.write_bytes(bytes(2**18))
    assert block_bytes_per_s(file, 2**16, 3, budget_s=0.0) > 0

    def fail(self: object, pieces: object, destination: object) -> int:
        raise TransferError("the disk is gone")

    monkeypatch.setattr("offload.store.files.FileReader.read", fail)
    with pytest.raises(TransferError, match="the disk is gone"):
        block_bytes_per_s(file, 2**16, 2, budget_s=0.0)


def test_a_slow_disk_gets_a_smaller_file_and_fewer_and_smaller_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes and reads 8 MB/s: of 64 MiB it has time for 32, and the largest records are left out."""
    clock, read = SlowClock(), FileReader.read

    def slow_read(self: FileReader, pieces: Any, destination: Any) -> int:
        clock.take(sum(piece.nbytes for piece in pieces) / 8e6)
        return read(self, pieces, destination)

    monkeypatch.setattr(os, "fsync", lambda descriptor: clock.take(2.0))
    monkeypatch.setattr(FileReader, "read", slow_read)
    with open_probe(tmp_path, 2**26, (2**18, 2**20, 2**22), Budget(4.0, clock)) as probe:
        (file,) = tmp_path.glob("*/*")
        assert file.stat().st_size == 2**25
        began_s = clock.now_s
        profile = probe.measure(Budget(6.0, clock), (2**16, 2**18, 2**24))
        assert clock.now_s - began_s < 10.0
    assert profile.alone.at == profile.streamed.at == (2**18,)
    assert {block.block_bytes for block in profile.blocks} == {2**16, 2**18}


def test_records_are_what_was_written(tmp_path: Path) -> None:
    """The probe reads real bytes with the engine: as many landings as records, in time order."""
    with open_probe(tmp_path, 2**22, (2**18,)) as probe:
        landings = probe.read(2**18, 8)
        assert len(landings) == 8
        assert landings == sorted(landings)
        (file,) = tmp_path.glob("*/*")
        assert file.stat().st_size == 2**22 + 8
        file.write_bytes(b"")
        with pytest.raises(Exception, match=r"ends at byte \d+"):
            probe.read(2**18)
    assert list(tmp_path.iterdir()) == []


def test_slowdowns_are_factors_and_a_failing_read_is_raised(tmp_path: Path) -> None:
    with open_probe(tmp_path, 2**22, (2**18,)) as probe:
        assert min(slowdowns(probe, lambda: sum(range(1000)), 2**18, Budget(8.0))) >= 1
        (file,) = tmp_path.glob("*/*")
        broken = iter([None])

        def compute() -> None:
            if next(broken, 1) is not None:  # from the second call on
                file.write_bytes(b"")

        with pytest.raises(Exception, match="ends at byte"):
            slowdowns(probe, compute, 2**18, Budget(8.0))


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100 * 2**20))
    with (
        pytest.raises(DiskSpaceError, match=r"512.0 MiB.*100.0 MiB: free some, or choose another --disk"),
        open_probe(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="choose another --disk"), open_probe(tmp_path / "file" / "below"):
        pass
