"""Finding and downloading models, against a hub on localhost: bytes, kills, disks, refusals, offline."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import HubServer, Repository, Request
from huggingface_hub import constants

from cache.errors import CheckpointError, DiskSpaceError, OffloadError, UnknownModelError
from offload import download
from offload.hub import describe, fetch
from offload.shards import INDEX_NAME, ShardIndex

MIB = 1 << 20
MODEL = "acme/moe"
ROOT = Path(__file__).resolve().parents[2]
TEXT_FILES = {
    "config.json": b'{"model_type": "mixtral"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"legacy": false}',
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# read me",
    "modeling_acme.py": b"raise SystemExit",
}


def shard(tensors: dict[str, int], seed: int) -> bytes:
    """A safetensors file of random bytes: U8 vectors of the given lengths."""
    entries, end = {}, 0
    for name, length in tensors.items():
        entries[name] = {"dtype": "U8", "shape": [length], "data_offsets": [end, end + length]}
        end += length
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + np.random.default_rng(seed).bytes(end)


def checkpoint(shards: int = 4, shard_bytes: int = MIB, tensors: int = 8) -> dict[str, bytes]:
    """The files of a sharded checkpoint, as a hub repository holds them."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    parts = [{f"layers.{i}.{j}": shard_bytes // tensors for j in range(tensors)} for i in range(shards)]
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    weights = {name: shard(part, seed) for seed, (name, part) in enumerate(zip(names, parts, strict=True))}
    return TEXT_FILES | {INDEX_NAME: json.dumps({"weight_map": weight_map}).encode()} | weights


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on localhost that this process talks to, with an empty cache in `tmp_path / "hub"`."""
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "_MAX_WAIT_S", 0)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


def assert_complete(folder: Path, files: dict[str, bytes]) -> None:
    wanted = {name: content for name, content in files.items() if name not in ("README.md", "modeling_acme.py")}
    assert {path.name for path in folder.iterdir()} == set(wanted)
    for name, content in wanted.items():
        assert (folder / name).read_bytes() == content, name
    assert not list(folder.parents[1].glob("blobs/*incomplete*"))


def start_fetch(hub: HubServer, cache: Path) -> subprocess.Popen[bytes]:
    """Another process that fetches MODEL from `hub` into `cache`."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "0",
    }
    code = f"from offload.hub import fetch; fetch({MODEL!r})"
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)


def transfers(hub: HubServer) -> list[Request]:
    """Requests that were answered with a part of a shard or all of it."""
    return [request for request in hub.requests if request.end > 0 and request.file.endswith(".safetensors")]


def arrived(cache: Path) -> int:
    """Weights that have arrived in the cache so far, finished or not."""
    files = [path for path in cache.glob("*/blobs/*") if len(path.name.split(".")[0]) == 64]
    return sum(path.stat().st_size for path in files)


# ---------------------------------------------------------------- local folders


def test_a_local_folder_is_its_own_source(tmp_path: Path) -> None:
    for name, content in checkpoint().items():
        (tmp_path / name).write_bytes(content)
    for source in (describe(tmp_path), fetch(str(tmp_path))):
        assert source.name == str(tmp_path)
        assert source.folder == tmp_path
        assert source.local
        assert source.revision is None
        assert source.download_bytes == 0
        assert source.index.total_bytes == 4 * MIB


def test_a_local_folder_has_no_revisions(tmp_path: Path) -> None:
    for name, content in checkpoint().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnknownModelError, match='which has no revision "main": leave it out'):
        describe(tmp_path, revision="main")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"has no config.json: give the folder"):
        describe(tmp_path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnknownModelError, match="is a file: give the folder"):
        describe(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["", " ", "./nowhere", "/no/where", "~/no/where", "a/b/c", "a b/c", "../x", "a--b"])
def test_what_is_neither_a_folder_nor_an_id(name: str) -> None:
    with pytest.raises(UnknownModelError, match=r"there is no folder .* looks like Qwen/"):
        describe(name)


def test_a_damaged_local_checkpoint_is_refused_before_it_is_used(tmp_path: Path) -> None:
    files = checkpoint()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content[:-1] if name.startswith("model-00003") else content)
    with pytest.raises(CheckpointError, match=r"model-00003-of-00004.safetensors: truncated, it holds \d+ of \d+ "):
        describe(tmp_path)


# ---------------------------------------------------------------- describe


def test_describing_a_small_model_transfers_under_one_percent(hub: HubServer) -> None:
    files = checkpoint()
    hub.add(MODEL, files)
    describe(MODEL)
    assert 0 < hub.sent() < 0.01 * sum(map(len, files.values()))


def test_describing_a_hub_model_transfers_under_one_percent(hub: HubServer) -> None:
    files = checkpoint(shards=4, shard_bytes=16 * MIB)
    repository = hub.add(MODEL, files)
    source = describe(MODEL)
    assert 0 < hub.sent() < 0.01 * sum(map(len, files.values()))
    assert not source.local
    assert source.revision == repository.commit
    assert source.index.total_bytes == 64 * MIB
    assert source.index.file_sizes == {name: len(content) for name, content in weights_of(files).items()}
    tensor = source.index["layers.2.3"]
    content = files[tensor.file]
    assert content[tensor.offset : tensor.offset + tensor.nbytes] == content[-5 * 2 * MIB : -4 * 2 * MIB]
    assert (source.folder / "config.json").read_bytes() == files["config.json"]
    texts = sum(len(files[name]) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    assert source.download_bytes == texts + sum(map(len, weights_of(files).values()))


def test_a_header_longer_than_the_first_guess(hub: HubServer) -> None:
    files = checkpoint(shards=2, tensors=2048)
    hub.add(MODEL, files)
    source = describe(MODEL)
    assert len(source.index) == 4096
    ranges = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert len(ranges) == 4
    assert hub.sent(".safetensors") == sum(files[name].index(b"}}") + 2 for name in weights_of(files))


def test_a_revision_is_followed(hub: HubServer) -> None:
    repository = hub.add(MODEL, checkpoint(), branches=("dev",))
    assert describe(MODEL, revision="dev").revision == repository.commit
    assert describe(MODEL, revision=repository.commit).revision == repository.commit
    with pytest.raises(UnknownModelError, match='acme/moe has no revision "main"'):
        describe(MODEL)


def test_code_is_only_transferred_when_the_config_names_it(hub: HubServer) -> None:
    files = checkpoint() | {"config.json": b'{"auto_map": {"AutoConfig": "modeling_acme.AcmeConfig"}}'}
    hub.add(MODEL, files)
    assert (describe(MODEL).folder / "modeling_acme.py").read_bytes() == files["modeling_acme.py"]


def test_a_single_file_checkpoint(hub: HubServer) -> None:
    hub.add(MODEL, TEXT_FILES | {"model.safetensors": shard({"w": MIB}, 0), "consolidated.safetensors": b"other"})
    source = fetch(MODEL)
    assert list(source.index) == ["w"]
    assert not (source.folder / "consolidated.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model-00002-of-00004.safetensors", b"", "model-00002-of-00004.safetensors: truncated"),
        ("model-00002-of-00004.safetensors", b"\xff" * 100, "not a safetensors file"),
        ("model-00002-of-00004.safetensors", shard({"w": 100}, 0)[:-1], "it holds .* bytes"),
        ("model-00002-of-00004.safetensors", shard({"w": 100}, 0), "does not hold tensor layers.1.0"),
        (
            "model-00002-of-00004.safetensors",
            None,
            "acme/moe: shard model-00002-of-00004.safetensors is missing",
        ),
        (INDEX_NAME, b"{", "not a weight index"),
        (INDEX_NAME, b'{"weight_map": {"w": "../../evil.safetensors"}}', "not a .safetensors file inside"),
    ],
)
def test_damage_at_the_hub_is_found_before_the_weights_are_transferred(
    hub: HubServer, name: str, content: bytes | None, said: str
) -> None:
    files = checkpoint(shard_bytes=4 * MIB)
    if content is None:
        del files[name]
    else:
        files[name] = content
    hub.add(MODEL, files)
    with pytest.raises(CheckpointError, match=said):
        fetch(MODEL)
    assert hub.sent(".safetensors") < MIB


def test_pickled_weights_are_refused(hub: HubServer) -> None:
    hub.add(MODEL, TEXT_FILES | {"pytorch_model.bin": bytes(MIB)})
    with pytest.raises(CheckpointError, match=r"hub model acme/moe: .* pickles \(pytorch_model.bin\)"):
        fetch(MODEL)
    assert hub.sent(".bin") == 0


# ---------------------------------------------------------------- fetch


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
    assert describe(MODEL).index.total_bytes == 8 * MIB
    (name,) = weights_of(files)
    blob = Path(constants.HF_HUB_CACHE, "models--acme--moe", "blobs", repository.etag(name))
    blob.with_name(blob.name + ".offload.incomplete").write_bytes(files[name][: 3 * MIB])
    assert_complete(fetch(MODEL).folder, files)


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


# ---------------------------------------------------------------- disk space


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


# ---------------------------------------------------------------- refusals and offline


def test_an_unknown_id(hub: HubServer) -> None:
    with pytest.raises(UnknownModelError, match=rf"no folder acme/none here and no such model at {hub.url}: check"):
        describe("acme/none")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model(hub: HubServer, status: int) -> None:
    hub.add(MODEL, checkpoint(), gated_status=status)
    with pytest.raises(UnknownModelError, match=rf"is gated: accept its terms at {hub.url}/{MODEL}, then run `hf auth"):
        describe(MODEL)


def test_a_token_is_sent_to_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add(MODEL, checkpoint())
    fetch(MODEL)
    assert all(request.authorized for request in hub.requests)


def test_a_repository_without_a_config(hub: HubServer) -> None:
    hub.add(MODEL, weights_of(checkpoint()))
    with pytest.raises(UnknownModelError, match=r"has no config.json: use a transformers checkpoint"):
        describe(MODEL)


def test_no_network(hub: HubServer) -> None:
    hub.close()
    with pytest.raises(
        UnknownModelError, match=rf"cannot reach {hub.url} \(.+\), and there is no folder acme/moe here"
    ):
        describe(MODEL)


def test_a_login_page_instead_of_a_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(MODEL, checkpoint())
    monkeypatch.setattr(Repository, "siblings", lambda self: [{"rfilename": "config.json", "size": 3}])
    with pytest.raises(UnknownModelError, match="does not answer like a hub"):
        describe(MODEL)


@pytest.mark.parametrize("way", ["closed", "argument", "environment"])
def test_a_cached_model_works_without_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    files = checkpoint()
    repository = hub.add(MODEL, files)
    fetch(MODEL)
    if way == "closed":
        hub.close()
    elif way == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    options: dict[str, Any] = {"local_files_only": way == "argument"}
    for source in (
        describe(MODEL, **options),
        fetch(MODEL, **options),
        fetch(MODEL, revision=repository.commit),
    ):
        assert source.local
        assert source.revision == repository.commit
        assert_complete(source.folder, files)
    if way != "argument":
        assert len(hub.requests) == before


def test_a_model_that_is_only_partly_cached_needs_the_network(hub: HubServer) -> None:
    files = checkpoint()
    hub.add(MODEL, files)
    with pytest.raises(UnknownModelError, match="run once without offline mode"):
        fetch(MODEL, local_files_only=True)
    folder = fetch(MODEL).folder
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00003-of-00004.safetensors is missing \(3 of 4"):
        fetch(MODEL, local_files_only=True)
    hub.close()
    with pytest.raises(UnknownModelError, match="cannot reach"):
        fetch(MODEL)


def test_planning_a_newer_commit_leaves_the_complete_older_one_usable(hub: HubServer) -> None:
    first = hub.add(MODEL, checkpoint())
    fetch(MODEL)
    hub.repositories[MODEL] = Repository(checkpoint(shards=2), "f" * 40)
    assert describe(MODEL).revision == "f" * 40
    assert describe(MODEL, local_files_only=True).revision == first.commit


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
