"""The shard index: right offsets for sound checkpoints, one clear line for every kind of damage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cache.errors import CheckpointError
from offload.checkpoint.shards import INDEX_NAME, ShardIndex, TensorInfo, parse_header

RNG = np.random.default_rng(0)


def arrays(*names: str) -> dict[str, np.ndarray]:
    return {name: RNG.standard_normal((3, len(name))).astype(np.float16) for name in names}


def shard_bytes(entries: dict[str, Any], data: int) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(data)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_reads_back(index: ShardIndex, expected: dict[str, np.ndarray]) -> None:
    assert set(index) == set(expected)
    for name, array in expected.items():
        info = index[name]
        assert (info.dtype, info.shape, info.nbytes) == ("F16", array.shape, array.nbytes)
        with Path(info.file).open("rb") as file:
            file.seek(info.offset)
            assert file.read(info.nbytes) == array.tobytes()


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        ShardIndex.from_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_offsets_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    first, second = arrays("embed", "layer.0"), arrays("layer.1", "norm", "head")
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {n: f"model-0000{i}-of-00002.safetensors" for i, a in ((1, first), (2, second)) for n in a})
    index = ShardIndex.from_folder(tmp_path)
    assert_reads_back(index, first | second)
    assert index.folder == tmp_path
    assert sum(info.nbytes for info in index.values()) == sum(array.nbytes for array in (first | second).values())
    assert index.file_sizes == {str(p): p.stat().st_size for p in tmp_path.glob("*.safetensors")}


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    save_file(arrays("b", "a", "c"), tmp_path / "model.safetensors")
    offsets = [info.offset for info in ShardIndex.from_folder(tmp_path).values()]
    assert offsets == sorted(offsets)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file(
        {"scalar": np.array(1, np.float16), "empty": np.zeros((0, 4), np.float16)},
        tmp_path / "model.safetensors",
    )
    index = ShardIndex.from_folder(tmp_path)
    assert (index["scalar"].shape, index["scalar"].nbytes) == ((), 2)
    assert (index["empty"].shape, index["empty"].nbytes) == ((0, 4), 0)


@pytest.mark.parametrize(
    ("present", "used"),
    [
        (["model.safetensors", "consolidated.safetensors", "model-extra.safetensors"], ["model.safetensors"]),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "consolidated.safetensors",
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"],
            ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"],
        ),
        (["part_b.safetensors", "part_a.safetensors"], ["part_a.safetensors", "part_b.safetensors"]),
    ],
)
def test_which_files_make_up_a_checkpoint_without_an_index(tmp_path: Path, present: list[str], used: list[str]) -> None:
    for name in present:
        save_file(arrays(name), tmp_path / name)
    assert set(ShardIndex.from_folder(tmp_path)) == set(used)


def test_an_index_decides_over_all_other_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.safetensors", "deep/b.safetensors", "model.safetensors"):
        save_file(arrays(name), tmp_path / name)
    write_index(tmp_path, {"a.safetensors": "a.safetensors", "deep/b.safetensors": "deep/b.safetensors"})
    assert set(ShardIndex.from_folder(tmp_path)) == {"a.safetensors", "deep/b.safetensors"}


def test_an_index_may_spell_a_name_in_several_ways(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        save_file(arrays(name, f"more {name}"), tmp_path / f"{name}.safetensors")
    spelled = {"a": "./a.safetensors", "more a": "a.safetensors"}
    spelled |= {"deep/b": "deep//b.safetensors", "more deep/b": "deep/./b.safetensors"}
    write_index(tmp_path, spelled)
    index = ShardIndex.from_folder(tmp_path)
    assert set(index) == spelled.keys()
    assert set(index.file_sizes) == {str(tmp_path / "a.safetensors"), str(tmp_path / "deep" / "b.safetensors")}


def test_an_index_of_files_that_are_elsewhere(tmp_path: Path) -> None:
    save_file(arrays("w"), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    local = ShardIndex.from_folder(tmp_path)["w"]
    index = ShardIndex.from_headers({"model.safetensors": whole[: local.offset]}, {"model.safetensors": len(whole)})
    assert index.folder is None
    assert dict(index) == {"w": TensorInfo("model.safetensors", "w", "F16", local.shape, local.offset, local.nbytes)}
    assert index.file_sizes == {"model.safetensors": len(whole)}


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, with_index: bool) -> None:
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in names:
        save_file(arrays(name), tmp_path / name)
    if with_index:
        write_index(tmp_path, {name: name for name in names})
    (tmp_path / names[1]).unlink()
    assert re.search(rf"shard {names[1]} is missing \(2 of 3 are there\)", refusal(tmp_path))


def test_a_name_that_promises_absurdly_many_shards(tmp_path: Path) -> None:
    save_file(arrays("w"), tmp_path / "model-1-of-999999999999999.safetensors")
    assert "1 of 999999999999999 are there" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 20, -2, -1])
def test_a_truncated_shard(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(arrays("w"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    message = refusal(tmp_path)
    assert f"{path}: truncated, it holds {path.stat().st_size} " in message
    if kept < 0:
        assert f"{len(whole) + kept} of {len(whole)} bytes" in message


def test_a_shard_with_bytes_to_spare(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(arrays("w"), path)
    with path.open("ab") as file:
        file.write(b"abc")
    assert "3 more than its header says" in refusal(tmp_path)


F16 = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff" * 100, "not a safetensors file"),
        (b"<html>not found</html>", "not a safetensors file"),
        ((5).to_bytes(8, "little") + b"{oops", "not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        (shard_bytes({"__metadata__": [], "w": F16}, 4), "metadata is not names and texts"),
        (shard_bytes({"__metadata__": "x", "w": F16}, 4), "metadata is not names and texts"),
        (shard_bytes({"__metadata__": {"format": 1}, "w": F16}, 4), "metadata is not names and texts"),
        (shard_bytes({"w": [1]}, 4), "entry for tensor w is damaged"),
        (shard_bytes({"w": {**F16, "shape": [-2]}}, 4), "entry for tensor w is damaged"),
        (shard_bytes({"w": {**F16, "shape": [True, 2]}}, 4), "entry for tensor w is damaged"),
        (shard_bytes({"w": {**F16, "data_offsets": [0]}}, 4), "entry for tensor w is damaged"),
        (shard_bytes({"w": {**F16, "dtype": ["F16"]}}, 4), "entry for tensor w is damaged"),
        (shard_bytes({"w": {**F16, "dtype": "F17"}}, 4), 'unknown dtype "F17"'),
        (shard_bytes({"w": {**F16, "shape": [3]}}, 4), "F16 [3], which is not the 4 bytes"),
        (shard_bytes({"w": {**F16, "data_offsets": [4, 0]}}, 4), "which is not the -4 bytes"),
        (shard_bytes({"w": F16, "v": {**F16, "data_offsets": [2, 6]}}, 6), "overlaps"),
        (shard_bytes({"w": F16, "v": F16}, 4), "overlaps"),
        (shard_bytes({"w": F16, "v": {**F16, "data_offsets": [6, 10]}}, 10), "follows a gap"),
        (shard_bytes({"w": {**F16, "data_offsets": [2, 6]}}, 6), "follows a gap"),
        (shard_bytes({"w": {**F16, "shape": [2**40], "data_offsets": [0, 2**41]}}, 4), "truncated"),
    ],
)
def test_a_damaged_header(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert said in refusal(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file(arrays("w"), tmp_path / "a.safetensors")
    save_file(arrays("w"), tmp_path / "b.safetensors")
    assert f"tensor w is in {tmp_path / 'a.safetensors'} too" in refusal(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [{"w": "a.safetensors", "gone": "a.safetensors"}, {"w": "b.safetensors", "v": "a.safetensors"}],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, weight_map: dict[str, str]) -> None:
    save_file(arrays("w"), tmp_path / "a.safetensors")
    save_file(arrays("v"), tmp_path / "b.safetensors")
    write_index(tmp_path, weight_map)
    assert re.search(r"does not hold tensor (gone|w|v), which model.safetensors.index.json places", refusal(tmp_path))


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": "../model.safetensors"}}',
        '{"weight_map": {"w": "/etc/model.safetensors"}}',
        '{"weight_map": {"w": "C:model.safetensors"}}',
        '{"weight_map": {"w": "pytorch_model.bin"}}',
        '{"weight_map": {"w": "model.safetensors/"}}',
    ],
)
def test_a_damaged_index(tmp_path: Path, index: str) -> None:
    save_file(arrays("w"), tmp_path / "model.safetensors")
    (tmp_path / INDEX_NAME).write_text(index)
    assert INDEX_NAME in refusal(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin" in refusal(tmp_path)
    assert "can run code" in refusal(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "no .safetensors weights" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "nowhere")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_one_changed_byte_is_refused_or_harmless(data: st.DataObject) -> None:
    entries = {"__metadata__": {"format": "pt"}, "w": F16, "v": {**F16, "data_offsets": [4, 8]}}
    sound = shard_bytes(entries, 8)
    position = data.draw(st.integers(0, len(sound) - 9), label="position")
    changed = bytearray(sound)
    changed[position] = data.draw(st.integers(0, 255), label="byte")
    try:
        tensors = parse_header(bytes(changed), len(sound), "file")
    except CheckpointError as error:
        assert str(error).startswith("file: ")
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) == 8
        assert max(tensor.offset + tensor.nbytes for tensor in tensors.values()) == len(sound)
