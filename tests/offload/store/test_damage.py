"""Stores that were damaged, or belong to another checkpoint: found, named, mended where the checkpoint can."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from tiny_store import contents, converted, keys, mapped, origin

from cache.errors import StoreError, TransferError
from cache.types import ExpertKey
from offload.checkpoint.shards import ShardIndex
from offload.store.convert import convert
from offload.store.index import INDEX, Origin, StoreIndex
from offload.store.precisions import PrecisionStore
from offload.store.record import layouts_of
from offload.system.progress import Bar

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_flipped_bits_are_found_named_and_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One bit in each of 50 records: each is caught when it is first read, and the file is whole afterwards."""
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16, num_local_experts=32)
    experts = mapped(model)
    index = converted(model, tmp_path / "store", ("nf4", "nested"))
    whole = contents(tmp_path / "store")
    rng = random.Random(1)
    damaged = []
    for name in ("nf4", "nested"):
        nbytes = [layout.record_bytes for layout in layouts_of(experts, name)]
        for number in rng.sample(range(len(keys(experts))), 25):
            key = keys(experts)[number]
            start = sum(nbytes[k.layer] for k in keys(experts)[:number])
            flip(tmp_path / "store" / f"{name}.experts", start + rng.randrange(nbytes[key.layer]), rng.randrange(8))
            damaged.append((name, key))
    with caplog.at_level(logging.WARNING, "offload.store.base"):
        for name in ("nf4", "nested8"):
            source = PrecisionStore(experts, [name], "cpu", tmp_path / "store", index).slices[0]
            reader, mended = source.open(), {}
            for key in keys(experts):
                assert source.parts(key, 2) == 1
                mended[key] = tiny.aligned(source.slot_bytes)
                reader.read(key, mended[key])
            fresh = PrecisionStore(experts, [name], "cpu", tmp_path / "store", index).slices[0].open()
            for key in keys(experts):
                again = tiny.aligned(source.slot_bytes)
                fresh.read(key, again)
                assert torch.equal(mended[key], again)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(damaged) == 50
    for name, (layer, expert) in damaged:
        assert any(f"expert {expert} in layer {layer} in" in line and f"{name}.experts" in line for line in said)
    assert contents(tmp_path / "store") == whole


def test_damage_that_cannot_be_mended_is_an_error(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    experts = mapped(model)
    index = converted(model, tmp_path / "store", ("int8",))
    index.formats["int8"].checksums[1][2][0] ^= 1
    source = PrecisionStore(experts, ["int8"], "cpu", tmp_path / "store", index).slices[0]
    reader, slot = source.open(), tiny.aligned(source.slot_bytes)
    with pytest.raises(TransferError, match=r"expert 2 in layer 1 .* the checkpoint does not give the same"):
        reader.read(ExpertKey(1, 2), slot)


def test_a_store_serves_no_other_checkpoint(tmp_path: Path) -> None:
    first = tiny.save(tmp_path / "first", "mixtral", torch.bfloat16)
    other = tiny.save(tmp_path / "other", "mixtral", torch.bfloat16, num_local_experts=4)
    converted(first, tmp_path / "store", ("int8",))
    with pytest.raises(StoreError, match="another checkpoint than other"):
        converted(other, tmp_path / "store", ("int8",))
    assert origin(first).folder() != origin(other).folder()


def test_folders_share_no_store_and_what_is_complete_needs_no_lock(tmp_path: Path) -> None:
    """Two runs' checkpoints, both called `final`, with equal shapes; and a store in which nothing can be written."""
    folders = [tmp_path / run / "final" for run in ("run1", "run2")]
    for folder in folders:
        tiny.save(folder, "mixtral", torch.bfloat16)
    stores = [Origin.of(str(f), None, ShardIndex.from_folder(f), mapped(f)).folder() for f in folders]
    assert stores[0] != stores[1]
    converted(folders[0], tmp_path / "store", ("int8",))
    (tmp_path / "store" / "lock").unlink()
    converted(folders[0], tmp_path / "store", ("int8",))
    assert not (tmp_path / "store" / "lock").exists()


def test_a_checkpoint_that_was_touched_is_compared(tmp_path: Path) -> None:
    """A new time and the old bytes are accepted, once they have been read; other bytes are not."""
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    converted(model, tmp_path / "store", ("int8",))
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert converted(model, tmp_path / "store", ("int8",)).origin.modified == {"model.safetensors": 1}
    stored = StoreIndex.read(tmp_path / "store")
    assert stored is not None and stored.origin.modified == {"model.safetensors": 1}

    def negate(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "experts.1.w2" in name)
        tensors[name].neg_()

    tiny.edit_tensors(model, negate)
    with pytest.raises(StoreError, match="was changed after its experts were converted"):
        converted(model, tmp_path / "store", ("int8",))


def test_other_weights_of_the_same_time_and_shapes_are_told_apart(tmp_path: Path) -> None:
    """As in container images, which give every file one time."""
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    shard = model / "model.safetensors"
    os.utime(shard, ns=(1, 1))
    converted(model, tmp_path / "store", ("int8",))
    before = origin(model)
    tiny.edit_tensors(model, lambda tensors: [tensor.neg_() for name, tensor in tensors.items() if "experts" in name])
    os.utime(shard, ns=(1, 1))
    assert origin(model).modified == before.modified and origin(model).digest == before.digest
    with pytest.raises(StoreError, match="was changed after its experts were converted, expert 0 of layer 0"):
        converted(model, tmp_path / "store", ("int8",))


def forget_samples(store: Path) -> None:
    """The index as versions before samples wrote it."""
    index = json.loads((store / INDEX).read_text())
    del index["origin"]["samples"]
    (store / INDEX).write_text(json.dumps(index))


def compared(model: Path, store: Path) -> tuple[StoreIndex, list[str]]:
    """A start with converted experts, and what it says."""
    said: list[str] = []
    bar = Bar()
    bar.say = said.append  # type: ignore[method-assign]
    return convert(store, origin(model), mapped(model), ("int8",), bar=bar), said


def test_a_store_without_samples_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16), tmp_path / "store"
    converted(model, store, ("int8",))
    whole = contents(store)
    forget_samples(store)
    with monkeypatch.context() as patch:  # where nothing can be written, at each start
        patch.setattr(os, "access", lambda path, mode: False)
        for _ in range(2):
            index, said = compared(model, store)
            assert index.origin == origin(model) and "an earlier version converted them" in said[0]
    index, said = compared(model, store)
    assert len(said) == 1 and contents(store) == whole
    assert compared(model, store) == (index, [])
    forget_samples(store)
    tiny.edit_tensors(model, lambda tensors: [tensor.neg_() for name, tensor in tensors.items() if "experts" in name])
    with pytest.raises(StoreError, match="was changed after its experts were converted"):
        compared(model, store)


def test_a_mended_record_is_no_change_for_other_slices(tmp_path: Path) -> None:
    """The slices of a nested format share a file; so do readers of each."""
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    experts, index = mapped(model), converted(model, tmp_path / "store", ("nested",))
    file = tmp_path / "store" / "nested.experts"
    flip(file, 0, 0)
    slices = PrecisionStore(experts, ["nested8", "nested4"], "cpu", tmp_path / "store", index).slices
    opened = [(source, source.open()) for source in slices for _ in range(2)]
    for _ in range(2):
        for source, reader in opened:
            for key in keys(experts)[:2]:
                reader.read(key, tiny.aligned(source.slot_bytes))
    assert sum(len(source.repaired) for source in slices) == 1  # type: ignore[attr-defined]
    file.write_bytes(file.read_bytes())
    for source, reader in opened:
        with pytest.raises(TransferError, match="was changed while the model was running"):
            reader.read(keys(experts)[0], tiny.aligned(source.slot_bytes))
        reader.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[" * 10**5, "is damaged"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "has version 2, this program reads version 1"),
        (lambda text: text.replace("offload-experts", "something"), "is damaged"),
        (lambda text: text.replace('"sources"', '"source"'), "is damaged"),
        (lambda text: text.replace("int8.experts", "../int8.experts"), "its file is elsewhere"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    converted(model, tmp_path / "store", ("int8",))
    path = tmp_path / "store" / INDEX
    path.write_text(damage(path.read_text()))
    with pytest.raises(StoreError, match=message):
        converted(model, tmp_path / "store", ("int8",))


def test_a_file_that_is_cut_short_is_made_again(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    converted(model, tmp_path / "store", ("int8",))
    whole = contents(tmp_path / "store")
    os.truncate(tmp_path / "store" / "int8.experts", 4096)
    converted(model, tmp_path / "store", ("int8",))
    assert contents(tmp_path / "store") == whole


def test_a_file_is_no_store(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is no folder: name one"):
        converted(model, tmp_path / "file", ("int8",))
