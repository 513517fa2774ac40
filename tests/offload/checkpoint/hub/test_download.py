"""Downloading a model from a hub on localhost: complete, once, and however it is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from hub_files import MIB, MODEL, TEXT_FILES, arrived, assert_complete, checkpoint, weights_of
from hub_server import HubServer, Repository, Request, running_hub
from huggingface_hub import constants

from cache.errors import UnknownModelError
from offload.checkpoint.hub import download
from offload.checkpoint.hub.files import describe, fetch
from offload.checkpoint.shards import ShardIndex

ROOT = Path(__file__).resolve().parents[3]
hub = running_hub  # the fixture


def start_fetch(hub: HubServer, cache: Path) -> subprocess.Popen[bytes]:
    """Another process that fetches MODEL from `hub` into `cache`."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "0",
    }
    code = f"from offload.checkpoint.hub.files import fetch; fetch({MODEL!r})"
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)


def transfers(hub: HubServer) -> list[Request]:
    """Requests that were answered with a part of a shard or all of it."""
    return [request for request in hub.requests if request.end > 0 and request.file.endswith(".safetensors")]


def test_a_fetched_model_is_complete_and_where_other_tools_look(hub: HubServer) -> None:
    files = checkpoint()
    repository = hub.add(MODEL, files)
    source = fetch(MODEL)
    assert source.local
    assert source.download_bytes == 0
    assert_complete(source.folder, files)
    assert dict(source.index) == dict(ShardIndex.from_folder(source.folder))
    assert huggingface_hub.hf_hub_download(MODEL, "config.json", local_files_only=True) == str(
        source.folder / "config.json"
    )
    (cached,) = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert (cached.repo_id, [revision.commit_hash for revision in cached.revisions]) == (
        MODEL,
        [repository.commit],
    )


def test_what_is_there_is_not_transferred_again(hub: HubServer) -> None:
    hub.add(MODEL, checkpoint())
    fetch(MODEL)
    before = hub.sent(".safetensors")
    assert fetch(MODEL).local
    assert describe(MODEL).local
    assert describe(MODEL).download_bytes == 0
    assert hub.sent(".safetensors") == before


def test_a_new_commit_transfers_only_what_changed(hub: HubServer) -> None:
    files = checkpoint()
    fetch_first = hub.add(MODEL, files)
    fetch(MODEL)
    before = hub.sent(".safetensors")
    hub.repositories[MODEL] = Repository(files | {"config.json": b'{"model_type": "olmoe"}'}, "f" * 40)
    source = fetch(MODEL)
    assert source.revision == "f" * 40 != fetch_first.commit
    assert json.loads((source.folder / "config.json").read_bytes())["model_type"] == "olmoe"
    assert hub.sent(".safetensors") == before


def test_a_download_killed_at_three_points_continues(hub: HubServer, tmp_path: Path) -> None:
    files = checkpoint(shards=8, shard_bytes=8 * MIB)
    hub.add(MODEL, files)
    cache, total = tmp_path / "hub", sum(map(len, weights_of(files).values()))
    for _ in range(3):
        before = hub.sent(".safetensors") - arrived(cache)
        hub.hold(total // 4)
        child = start_fetch(hub, cache)
        # A kill may lose what is in flight: of each transfer less than a chunk, and some headers.
        in_flight = download._TRANSFERS * download._CHUNK_BYTES + MIB // 4
        while child.poll() is None and not (
            hub.holding.is_set() and hub.sent(".safetensors") - arrived(cache) - before <= in_flight
        ):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        hub.release()
        assert 0 < arrived(cache) < total
    source = describe(MODEL)
    assert source.download_bytes <= total - arrived(cache) + sum(map(len, TEXT_FILES.values()))
    fetch(MODEL)
    assert_complete(source.folder, files)
    assert total <= hub.sent(".safetensors") < 1.1 * total
    assert sum(request.begin > 0 for request in hub.requests) >= 3


def test_interrupting_keeps_what_has_arrived(hub: HubServer, tmp_path: Path) -> None:
    files = checkpoint(shards=2, shard_bytes=8 * MIB)
    hub.add(MODEL, files)
    hub.hold(8 * MIB)
    child = start_fetch(hub, tmp_path / "hub")
    while child.poll() is None and arrived(tmp_path / "hub") < 4 * MIB:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    hub.release()
    _, stderr = child.communicate()
    assert stderr.rstrip().endswith(b"KeyboardInterrupt")
    kept = arrived(tmp_path / "hub")
    assert 4 * MIB <= kept < 16 * MIB
    before = hub.sent(".safetensors")
    assert_complete(fetch(MODEL).folder, files)
    assert hub.sent(".safetensors") - before <= 16 * MIB - kept + MIB


def test_two_processes_share_one_download(hub: HubServer, tmp_path: Path) -> None:
    files = checkpoint(shards=4, shard_bytes=8 * MIB)
    hub.add(MODEL, files)
    hub.hold(MIB)
    children = [start_fetch(hub, tmp_path / "hub") for _ in range(2)]
    while sum(request.end - request.begin <= MIB for request in transfers(hub)) < 2 * 4:
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
    time.sleep(0.3)  # both have read the headers: enough for the second to start what it must not
    assert sum(request.end - request.begin > MIB for request in transfers(hub)) <= 4
    hub.release()
    for child in children:
        _, stderr = child.communicate()
        assert child.returncode == 0, stderr
    assert_complete(fetch(MODEL).folder, files)
    assert hub.sent(".safetensors") < 1.1 * sum(map(len, weights_of(files).values()))


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: HubServer) -> None:
    files = checkpoint(shards=2, shard_bytes=2 * MIB)
    hub.add(MODEL, files)
    hub.break_after = 512 * 1024
    assert_complete(fetch(MODEL).folder, files)
    assert sum(request.begin > 0 for request in hub.requests) >= 6
    assert hub.sent(".safetensors") < 1.6 * 4 * MIB


def test_a_server_that_only_sends_whole_files(hub: HubServer) -> None:
    files = checkpoint(shards=1, shard_bytes=8 * MIB)
    repository = hub.add(MODEL, files)
    hub.ranges = False
    assert sum(info.nbytes for info in describe(MODEL).index.values()) == 8 * MIB
    (name,) = weights_of(files)
    blob = Path(constants.HF_HUB_CACHE, "models--acme--moe", "blobs", repository.etag(name))
    blob.with_name(blob.name + ".offload.incomplete").write_bytes(files[name][: 3 * MIB])
    assert_complete(fetch(MODEL).folder, files)
    assert len(transfers(hub)) == 3  # the header twice, and the rest once


def test_a_hub_that_is_busy_for_a_while(hub: HubServer) -> None:
    files = checkpoint(shards=1)
    hub.add(MODEL, files)
    hub.busy = 4
    describe(MODEL)
    hub.busy = 4
    assert_complete(fetch(MODEL).folder, files)
    assert hub.busy == 0


def test_a_server_that_sends_nothing_is_given_up(hub: HubServer) -> None:
    hub.add(MODEL, checkpoint())
    describe(MODEL)
    hub.break_after = 0
    with pytest.raises(UnknownModelError, match="run again to continue"):
        fetch(MODEL)
    hub.break_after = None
    assert fetch(MODEL).local


@pytest.mark.parametrize("length", [100, MIB, 9 * MIB])
def test_a_partial_file_that_is_not_the_beginning_of_the_real_one(hub: HubServer, length: int) -> None:
    files = checkpoint(shards=1)
    repository = hub.add(MODEL, files)
    describe(MODEL)
    (name,) = weights_of(files)
    blobs = Path(constants.HF_HUB_CACHE, "models--acme--moe", "blobs")
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / (repository.etag(name) + ".offload.incomplete")).write_bytes(bytes(length))
    assert_complete(fetch(MODEL).folder, files)


def test_a_small_partial_file_is_checked_too(hub: HubServer) -> None:
    files = checkpoint(shards=1)
    repository = hub.add(MODEL, files)
    blobs = Path(constants.HF_HUB_CACHE, "models--acme--moe", "blobs")
    blobs.mkdir(parents=True)
    (blobs / (repository.etag("config.json") + ".offload.incomplete")).write_bytes(b"{" * 10)
    (blobs / (repository.etag("tokenizer.json") + ".offload.incomplete")).write_bytes(b"{" * 100)
    assert_complete(fetch(MODEL).folder, files)


def test_a_finished_file_that_lost_bytes_is_transferred_again(hub: HubServer) -> None:
    files = checkpoint()
    hub.add(MODEL, files)
    (folder := fetch(MODEL).folder).joinpath("model-00001-of-00004.safetensors").resolve().write_bytes(b"short")
    assert describe(MODEL).download_bytes == len(files["model-00001-of-00004.safetensors"])
    fetch(MODEL)
    assert_complete(folder, files)


def test_equal_files_are_transferred_once(hub: HubServer) -> None:
    files = checkpoint() | {"vocab.json": b"same", "merges.txt": b"same", "added_tokens.json": b""}
    hub.add(MODEL, files)
    assert_complete(fetch(MODEL).folder, files)


def test_without_symlinks_the_snapshot_holds_the_bytes(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    files = checkpoint()
    hub.add(MODEL, files)
    assert_complete(fetch(MODEL).folder, files)
    before = hub.sent(".safetensors")
    assert fetch(MODEL).local
    assert hub.sent(".safetensors") == before


def test_progress_goes_to_stderr_and_only_when_asked(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add(MODEL, checkpoint())
    fetch(MODEL, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"Downloading {MODEL}" in shown.err
    assert "4.0/4.0 MiB" in shown.err
    shutil.rmtree(constants.HF_HUB_CACHE)
    fetch(MODEL)
    assert capsys.readouterr() == ("", "")
