"""Finding models, on this disk and at a hub on localhost: what is transferred, refused, and done offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_files import MIB, MODEL, TEXT_FILES, assert_complete, checkpoint, shard, weights_of
from hub_server import HubServer, Repository, running_hub
from huggingface_hub import constants

from cache.errors import CheckpointError, UnknownModelError
from offload.checkpoint.hub.files import describe, fetch
from offload.checkpoint.shards import INDEX_NAME

hub = running_hub  # the fixture


def test_a_local_folder_is_its_own_source(tmp_path: Path) -> None:
    for name, content in checkpoint().items():
        (tmp_path / name).write_bytes(content)
    for source in (describe(tmp_path), fetch(str(tmp_path))):
        assert source.name == str(tmp_path)
        assert source.folder == tmp_path
        assert source.local
        assert source.revision is None
        assert source.download_bytes == 0
        assert sum(info.nbytes for info in source.index.values()) == 4 * MIB


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


@pytest.mark.parametrize(
    "name",
    ["", " ", "./nowhere", "/no/where", "~/no/where", "a/b/c", "a b/c", "../x", "a--b", "~nobody-here/x", "x" * 5000],
)
def test_what_is_neither_a_folder_nor_an_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # whatever lies beside the working directory
    with pytest.raises(UnknownModelError, match=r"there is no folder .* looks like Qwen/"):
        describe(name)


def test_a_damaged_local_checkpoint_is_refused_before_it_is_used(tmp_path: Path) -> None:
    files = checkpoint()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content[:-1] if name.startswith("model-00003") else content)
    with pytest.raises(CheckpointError, match=r"model-00003-of-00004.safetensors: truncated, it holds \d+ of \d+ "):
        describe(tmp_path)


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
    assert sum(info.nbytes for info in source.index.values()) == 64 * MIB
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
        ("model-00002-of-00004.safetensors", b"", "hub model acme/moe: model-00002-of-00004.safetensors: truncated"),
        ("model-00002-of-00004.safetensors", b"\xff" * 100, "not a safetensors file"),
        ("model-00002-of-00004.safetensors", shard({"w": 100}, 0)[:-1], "it holds .* bytes"),
        ("model-00002-of-00004.safetensors", shard({"w": 100}, 0), "does not hold tensor layers.1.0"),
        (
            "model-00002-of-00004.safetensors",
            None,
            "acme/moe: shard model-00002-of-00004.safetensors is missing",
        ),
        (INDEX_NAME, b"{", "index.json is not JSON"),
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
