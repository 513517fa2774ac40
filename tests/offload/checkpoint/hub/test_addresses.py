"""What people write for a model: addresses of the hub's pages, revisions, folders of its cache, clones without LFS."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_files import MODEL, checkpoint
from hub_server import HubServer, running_hub

from cache.errors import CheckpointError, UnknownModelError
from offload.checkpoint.hub.address import id_and_revision
from offload.checkpoint.hub.files import describe, fetch
from offload.checkpoint.shards import INDEX_NAME

hub = running_hub  # the fixture
COMMIT = "0123456789" * 4
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("acme/moe", ("acme/moe", None)),
        ("acme/moe@v1.0", ("acme/moe", "v1.0")),
        ("moe@main", ("moe", "main")),
        ("acme/moe@refs/pr/1", ("acme/moe", "refs/pr/1")),
        ("hf.co/acme/moe", ("acme/moe", None)),
        ("huggingface.co/acme/moe", ("acme/moe", None)),
        ("https://huggingface.co/acme/moe", ("acme/moe", None)),
        ("https://huggingface.co/acme/moe/", ("acme/moe", None)),
        ("https://www.huggingface.co/acme/moe?not-for-all-audiences=true", ("acme/moe", None)),
        ("https://hf.co/acme/moe@v1.0", ("acme/moe", "v1.0")),
        ("https://huggingface.co/acme/moe/tree/main", ("acme/moe", "main")),
        ("https://huggingface.co/acme/moe/tree/refs%2Fpr%2F1", ("acme/moe", "refs/pr/1")),
        ("https://huggingface.co/acme/moe/blob/v2/config.json#L3", ("acme/moe", "v2")),
        ("https://huggingface.co/acme/moe/resolve/main/model.safetensors", ("acme/moe", "main")),
        ("hf://acme/moe@v1.0", ("acme/moe", "v1.0")),
        ("https://huggingface.co/datasets/acme/moe", ("https://huggingface.co/datasets/acme/moe", None)),
        ("https://example.org/acme/moe", ("https://example.org/acme/moe", None)),
        ("a@b@c", ("a@b@c", None)),
    ],
)
def test_an_address_is_an_id_and_a_revision(name: str, meant: tuple[str, str | None]) -> None:
    assert id_and_revision(name, None) == meant


def test_two_revisions_are_refused() -> None:
    assert id_and_revision("acme/moe@dev", "dev") == ("acme/moe", "dev")
    with pytest.raises(UnknownModelError, match='names the revision "dev", and --revision is "main": leave one out'):
        id_and_revision("acme/moe@dev", "main")


def test_a_hub_model_is_found_by_address(hub: HubServer) -> None:
    repository = hub.add(MODEL, checkpoint(), branches=("dev",))
    for name in (f"{MODEL}@dev", f"https://huggingface.co/{MODEL}/tree/dev"):
        source = fetch(name)
        assert (source.name, source.revision) == (MODEL, repository.commit)
    hub.close()
    assert describe(f"hf.co/{MODEL}@dev").local


def test_a_folder_here_goes_before_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "acme" / "moe@v1")
    assert describe("acme/moe@v1").folder == tmp_path / "acme" / "moe@v1"


def save(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in checkpoint(shards=1).items():
        (folder / name).write_bytes(content)


def test_a_folder_of_the_hubs_cache_stands_for_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "models--acme--moe"
    save(stored / "snapshots" / COMMIT)
    source = describe(stored)  # the only one
    assert (source.folder, source.revision) == (stored / "snapshots" / COMMIT, COMMIT)
    with pytest.raises(UnknownModelError, match=f'"dev", but those of {COMMIT}: '):
        describe(stored, revision="dev")
    save(stored / "snapshots" / ("f" * 40))
    with pytest.raises(UnknownModelError, match=f'"main", but those of {COMMIT}, f+: name one with --revision'):
        describe(stored)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(COMMIT)
    assert describe(stored).revision == COMMIT
    assert describe(stored, revision="f" * 40).revision == "f" * 40
    monkeypatch.chdir(stored)
    assert describe(".").revision == COMMIT


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX_NAME, "model-00001-of-00001.safetensors"])
def test_a_pointer_in_place_of_a_file_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    save(tmp_path / "clone")
    (tmp_path / "clone" / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: only a Git LFS pointer to the file: run `git lfs pull`"):
        describe(tmp_path / "clone")


def test_a_pointer_that_nothing_needs_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path / "clone")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "picture.png"):
        (tmp_path / "clone" / name).write_bytes(POINTER)
    (tmp_path / "clone" / "tokenizer.model").write_bytes(POINTER + bytes(1024))  # what only begins so is none
    assert describe(tmp_path / "clone").local
