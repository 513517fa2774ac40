"""Records that lie as a CPU computes with them: the same bytes in the slots, and nothing is done after the read."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from cache.errors import FormatError
from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.shards import ShardIndex
from offload.formats.cpu import native
from offload.formats.nf4 import has_packed_kernel
from offload.options import PlanOptions
from offload.plan.conversion import convert_model
from offload.store.convert import convert
from offload.store.index import Origin, StoreIndex
from offload.store.precisions import PrecisionStore, records_of, to_convert
from offload.store.record import layouts_of
from offload.store.records import RecordSlice

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

needs_kernel = pytest.mark.skipif(not has_packed_kernel(), reason="nf4 is packed for CPUs with AVX512-BF16")
PRECISIONS = ["nested4", "nested8", pytest.param("nf4", marks=needs_kernel)]
PLAIN = {"nested4": "nested", "nested8": "nested", "nf4": "nf4"}
READY = {"nested4": "nested4-cpu", "nested8": "nested8-cpu", "nf4": "nf4-tiles" if native.level() else "nf4-cpu"}
TYPED = {"nested4": "int4", "nf4": "nf4"}


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain design, and one that is transposed and has biases; sides that nf4's kernel takes."""
    sides = {"hidden_size": 128, "intermediate_size": 64}
    return tiny.save(tmp_path_factory.mktemp(request.param), request.param, torch.bfloat16, **sides)


def mapped(folder: Path) -> ExpertMap:
    return tiny.expert_map(folder, torch.bfloat16)


def converted(folder: Path, to: Path, *records: str) -> StoreIndex:
    experts = mapped(folder)
    return convert(to, Origin.of(folder.name, None, ShardIndex.from_folder(folder), experts), experts, records)


def slice_of(folder: Path, store: Path, index: StoreIndex, precision: str) -> RecordSlice:
    (found,) = PrecisionStore(mapped(folder), [precision], "cpu", store, index).slices
    assert isinstance(found, RecordSlice)
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_slots_are_the_same_to_the_bit(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    plain = slice_of(checkpoint, tmp_path / "a", converted(checkpoint, tmp_path / "a", PLAIN[precision]), precision)
    ready = slice_of(checkpoint, tmp_path / "b", converted(checkpoint, tmp_path / "b", READY[precision]), precision)
    assert plain.reader_bytes and not ready.reader_bytes
    assert ready.slot_bytes == plain.slot_bytes and ready.expert_bytes <= plain.expert_bytes
    expected, slot = tiny.aligned(plain.slot_bytes), tiny.aligned(plain.slot_bytes)
    first, second = plain.open(), ready.open()
    for layer in mapped(checkpoint).layers:
        for expert in range(layer.num_experts):
            expected.zero_()
            slot.zero_()
            first.read(ExpertKey(layer.index, expert), expected)
            second.read(ExpertKey(layer.index, expert), slot)
            assert torch.equal(slot, expected)
    first.close()
    second.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_damage_is_mended(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    record = READY[precision]
    index = converted(checkpoint, tmp_path, record)
    file = tmp_path / f"{record}.experts"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000] + bytes([whole[1000] ^ 4]) + whole[1001:])
    source = slice_of(checkpoint, tmp_path, index, precision)
    slot = tiny.aligned(source.slot_bytes)
    reader = source.open()
    reader.read(ExpertKey(0, 0), slot)
    reader.close()
    assert source.repaired == [ExpertKey(0, 0)]
    assert file.read_bytes() == whole
    assert (
        slot[: source.record_bytes(ExpertKey(0, 0))].numpy().tobytes() == whole[: source.record_bytes(ExpertKey(0, 0))]
    )


def test_which_records_serve(checkpoint: Path, tmp_path: Path) -> None:
    """Those for the device; plain ones where they are there; and plain ones for levels that share them."""
    experts = mapped(checkpoint)
    assert records_of(experts, ["nested4"], None, "cpu") == {"nested4": "nested4-cpu"}
    assert records_of(experts, ["nested4"], None, "cuda") == {"nested4": "nested"}
    assert records_of(experts, ["nested8", "nested4"], None, "cpu") == {"nested8": "nested", "nested4": "nested"}
    assert records_of(experts, ["int8", "nested2"], None, "cpu") == {"int8": "int8", "nested2": "nested"}
    index = converted(checkpoint, tmp_path, "nested")
    assert to_convert(experts, ["nested4"], index, "cpu") == ["nested"]
    index = converted(checkpoint, tmp_path, "nested4-cpu")
    assert records_of(experts, ["nested4"], index, "cpu") == {"nested4": "nested4-cpu"}
    assert records_of(experts, ["nested4"], index, "cuda") == {"nested4": "nested"}


@pytest.mark.skipif(not native.level(), reason="our kernels do not run here")
def test_records_in_another_order_are_no_use(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in the folder, for who computes with them: with and without our kernels NF4 lies differently."""
    experts = mapped(checkpoint)
    index = converted(checkpoint, tmp_path, "nf4-tiles")
    monkeypatch.setattr("offload.formats.nf4.has_packed_kernel", lambda: True)
    with monkeypatch.context() as without:
        without.setattr("offload.formats.cpu.native.level", lambda: native.NONE)
        assert to_convert(experts, ["nf4"], index, "cpu") == ["nf4-cpu"]
        with pytest.raises(FormatError, match="nf4-tiles: this CPU computes with records in another order"):
            layouts_of(experts, "nf4-tiles")
        index = converted(checkpoint, tmp_path, "nf4-cpu")
    assert set(index.formats) == {"nf4-cpu", "nf4-tiles"}
    assert records_of(experts, ["nf4"], index, "cpu") == {"nf4": "nf4-tiles"}


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "nested8"])
def test_a_model_says_the_same_from_either(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    logits = []
    for device in ("cuda", "cpu"):
        done = convert_model(
            checkpoint, PlanOptions(experts=TYPED[precision], expert_store=tmp_path / device, device=device)
        )
        assert list(done.nbytes) == [PLAIN[precision] if device == "cuda" else READY[precision]]
        options = {"experts": TYPED[precision], "expert_store": tmp_path / device, "device": "cpu"}
        with tiny.open_model(checkpoint, **options, expert_cache=4 * slot_bytes(checkpoint, precision)) as model:
            assert model.stats.as_dict()["misses"] == 0
            logits.append(model(tiny.ids(1, 12)).logits)
            assert model.stats.as_dict()["misses"] > 0
    assert tiny.same_bits(*logits)


def slot_bytes(folder: Path, precision: str) -> int:
    return PrecisionStore(mapped(folder), [precision], "cpu").slot_bytes[0]


def test_no_other_level_is_ready(checkpoint: Path) -> None:
    """What is computed as it is stored has one kind of record."""
    assert records_of(mapped(checkpoint), ["nested2"], None, "cpu") == {"nested2": "nested"}
    assert records_of(mapped(checkpoint), ["bf16", "int8"], None, "cpu") == {"bf16": "bf16", "int8": "int8"}
    assert all(len(layout.segments) == 1 for layout in layouts_of(mapped(checkpoint), "nested4-cpu"))
