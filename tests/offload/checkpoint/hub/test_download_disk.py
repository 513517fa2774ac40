"""Downloads and the disk: too small, full, not writable, failing."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
from hub_files import MIB, MODEL, arrived, assert_complete, checkpoint, weights_of
from hub_server import HubServer, running_hub
from huggingface_hub import constants

from cache.errors import DiskSpaceError, OffloadError
from offload.checkpoint.hub.files import describe, fetch

hub = running_hub  # the fixture


def limit_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_too_little_disk_is_refused_before_the_first_byte_of_weights(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = checkpoint(shard_bytes=4 * MIB)
    hub.add(MODEL, files)
    describe(MODEL)
    before = hub.sent(".safetensors")
    limit_disk(monkeypatch, 10 * MIB)
    with pytest.raises(DiskSpaceError, match=r"needs 16.0 MiB more, but .*hub has only 10.0 MiB free: .*HF_HOME"):
        fetch(MODEL)
    assert hub.sent(".safetensors") - before <= before
    assert arrived(Path(constants.HF_HUB_CACHE)) == 0


def test_what_is_already_there_needs_no_space(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    files = checkpoint(shard_bytes=4 * MIB)
    repository = hub.add(MODEL, files)
    describe(MODEL)
    blobs = Path(constants.HF_HUB_CACHE, "models--acme--moe", "blobs")
    first, second, *_ = weights_of(files)
    (blobs / repository.etag(first)).write_bytes(files[first])
    (blobs / (repository.etag(second) + ".offload.incomplete")).write_bytes(files[second][: 3 * MIB])
    limit_disk(monkeypatch, 9 * MIB + 10_000)
    before = hub.sent(".safetensors")
    assert_complete(fetch(MODEL).folder, files)
    assert hub.sent(".safetensors") - before < 9 * MIB + MIB


def test_a_disk_that_fills_up_meanwhile(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(MODEL, checkpoint())
    describe(MODEL)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError, match="is full: free some space and run again to continue"):
        fetch(MODEL)


def test_a_cache_that_cannot_be_written(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.add(MODEL, checkpoint())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(OffloadError, match="set HF_HOME to a folder that you may write to"):
        fetch(MODEL)


def test_a_failing_transfer_stops_the_others(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(MODEL, checkpoint(shards=8))
    describe(MODEL)
    threads = threading.active_count()

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error", "blob")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OffloadError, match="blob: Input/output error"):
        fetch(MODEL)
    assert threading.active_count() <= threads
