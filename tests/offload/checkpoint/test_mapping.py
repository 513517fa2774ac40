"""Every expert read from disk is, byte for byte, what transformers holds for it; what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from cache.errors import CheckpointError, ModelError, NotMoEError, UnsupportedFamilyError
from cache.types import ExpertKey
from offload.checkpoint.mapping import read_checkpoint
from offload.checkpoint.parameter import ALIGNMENT, Piece, align
from offload.checkpoint.shards import ShardIndex
from offload.checkpoint.skeleton import build_skeleton, find_experts, read_config, resolve_dtype
from offload.store.plain import CheckpointSlice

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

DESIGNS = {
    "qwen3_moe": "one tensor for each expert and projection",
    "mixtral": "the same, under other names",
    "gpt_oss": "one tensor for all experts, transposed, with biases",
    "nemotron_h": "no gate",
    "granitemoehybrid": "one tensor for all experts, under other names",
    "inkling2_text": "gate and up interleaved in memory but not on disk",
}


def read_all(folder: Path, dtype: torch.dtype) -> list[str]:
    """Compares every expert with transformers' parameters; returns the names of those that differ."""
    experts, resident = tiny.expert_map(folder, dtype), tiny.resident(folder, dtype)
    reader = CheckpointSlice(experts).open()
    wrong = []
    for layer in experts.layers:
        module = resident.get_submodule(layer.path)
        expected = {p.name: getattr(module, p.name) for p in layer.parameters}
        stacked = {n for n, p in module.named_parameters(recurse=False) if p.dim() > 1 and len(p) == layer.num_experts}
        assert stacked == expected.keys()
        for expert in reversed(range(layer.num_experts)):
            slot = tiny.aligned(experts.slot_bytes)
            assert reader.read(ExpertKey(layer.index, expert), slot) >= layer.record_bytes
            for name, view in layer.views(slot).items():
                assert view.data_ptr() % ALIGNMENT == 0
                if not tiny.same_bits(view, expected[name][expert]):
                    wrong.append(f"{layer.path}.{name}[{expert}]")
    reader.close()
    return wrong


@pytest.mark.parametrize("sharded", [False, True], ids=["one shard", "shards"])
@pytest.mark.parametrize("name", DESIGNS)
def test_experts_are_those_of_transformers(name: str, sharded: bool, tmp_path: Path) -> None:
    tiny.save(tmp_path, name, torch.bfloat16, "100KB" if sharded else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    assert read_all(tmp_path, torch.bfloat16) == []


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "inkling2_text"])
@pytest.mark.parametrize(("stored", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_experts_in_another_dtype_are_those_of_transformers(
    name: str, stored: torch.dtype, loaded: torch.dtype, tmp_path: Path
) -> None:
    tiny.save(tmp_path, name, stored)
    assert all(p.dtype is loaded for layer in tiny.expert_map(tmp_path, loaded).layers for p in layer.parameters)
    assert read_all(tmp_path, loaded) == []


def test_which_experts_are_read_straight_into_place(tmp_path: Path) -> None:
    for name in DESIGNS:
        folder = tiny.save(tmp_path / name, name, torch.bfloat16)
        converted = {p.name for layer in tiny.expert_map(folder, torch.bfloat16).layers for p in layer.converted}
        assert converted == ({"gate_up_proj"} if name == "inkling2_text" else set()), name
        recast = tiny.expert_map(folder, torch.float32).layers[0]
        assert recast.converted == recast.parameters and recast.slot_pieces(0) == []


@pytest.mark.parametrize("name", DESIGNS)
def test_every_tensor_is_dense_or_expert(name: str, tmp_path: Path) -> None:
    shards = ShardIndex.from_folder(tiny.save(tmp_path, name, torch.bfloat16))
    experts = tiny.expert_map(tmp_path, torch.bfloat16)
    dense_bytes = sum(tensor.nbytes for tensor in experts.dense.values())
    assert dense_bytes + experts.expert_bytes == sum(info.nbytes for info in shards.values())
    assert experts.total_experts == 8 * len(experts.layers) and experts.num_experts == 8

    read = [False] * sum(shards.file_sizes.values())
    for layer in experts.layers:
        for expert in range(layer.num_experts):
            for piece in layer.slot_pieces(expert) + layer.scratch_pieces(expert):
                span = slice(piece.offset, piece.offset + piece.nbytes)
                assert not any(read[span])  # no byte belongs to two experts
                read[span] = [True] * piece.nbytes
    for tensor in experts.dense.values():
        assert not any(read[tensor.offset : tensor.offset + tensor.nbytes])


def test_slots_keep_parameters_apart_and_aligned(tmp_path: Path) -> None:
    # A bias of 40 bf16 numbers is 80 bytes: the parameter after it must move to the next 64.
    tiny.save(tmp_path, "gpt_oss", torch.bfloat16, intermediate_size=20, hidden_size=40, head_dim=8)
    for layer in tiny.expert_map(tmp_path, torch.bfloat16).layers:
        end = 0
        for parameter in layer.parameters:
            assert parameter.slot_offset % ALIGNMENT == 0 and parameter.slot_offset >= end
            end = parameter.slot_offset + parameter.nbytes
        assert layer.slot_bytes % ALIGNMENT == 0 and end <= layer.slot_bytes < end + ALIGNMENT
        assert layer.slot_bytes > layer.record_bytes  # so there is padding in this test
    assert read_all(tmp_path, torch.bfloat16) == []
    assert read_all(tmp_path, torch.float32) == []


def test_what_must_be_converted_lies_apart_and_aligned_too(tmp_path: Path) -> None:
    # Gate and up are 400 bytes each, no multiple of 64.
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16, hidden_size=40, moe_intermediate_size=5)
    assert read_all(tmp_path, torch.float32) == []


def test_align() -> None:
    assert [align(n) for n in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]
    assert align(4097, 4096) == 8192


def test_a_conversion_that_shuffles_each_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposing one expert's matrix is transposing the last two dimensions of all of them."""
    tiny.save(tmp_path, "qwen3_moe")
    plain = tiny.resident(tmp_path)

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".experts." in name and name.endswith("down_proj.weight"):
                tensors[name] = tensors[name].t().contiguous()

    tiny.edit_tensors(tmp_path, transpose)
    add_operations(monkeypatch, Transpose(1, 2))
    experts = tiny.expert_map(tmp_path)
    reader, slot = CheckpointSlice(experts).open(), tiny.aligned(experts.slot_bytes)
    for layer in experts.layers:
        assert [p.name for p in layer.converted] == ["down_proj"]
        reader.read(ExpertKey(layer.index, 3), slot)
        assert tiny.same_bits(layer.views(slot)["down_proj"], plain.get_submodule(layer.path).down_proj[3])
    reader.close()


@pytest.mark.parametrize("operation", [Transpose(0, 1), Concatenate(0), MergeModulelist(1)])
def test_a_conversion_that_mixes_experts_is_refused(
    operation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    add_operations(monkeypatch, operation)
    with pytest.raises(UnsupportedFamilyError, match=f"{type(operation).__name__} of .*down_proj may mix experts"):
        tiny.expert_map(tmp_path)


def add_operations(monkeypatch: pytest.MonkeyPatch, *operations: Any) -> None:
    """The conversion of down_proj has further steps."""
    import offload.checkpoint.names

    mapping_of = offload.checkpoint.names.get_model_conversion_mapping

    def extended(*args: Any, **kwargs: Any) -> list[Any]:
        mapping = list(mapping_of(*args, **kwargs))
        for i, entry in enumerate(mapping):
            if isinstance(entry, WeightConverter) and "down_proj" in entry.target_patterns[0]:
                steps = [*entry.operations, *operations]
                mapping[i] = WeightConverter(list(entry.source_patterns), list(entry.target_patterns), steps)
        return mapping

    monkeypatch.setattr(offload.checkpoint.names, "get_model_conversion_mapping", extended)


def rewrite_config(folder: Path, **values: Any) -> None:
    """Change config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


Edit = Callable[[dict[str, torch.Tensor]], object]
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
DAMAGES: dict[str, tuple[Edit, str]] = {
    "one expert's tensor is missing": (lambda t: t.pop(UP), r"layers\.1.*7 tensors on disk.*8 experts"),
    "every down_proj of a layer is missing": (
        lambda t: [t.pop(name) for name in list(t) if "layers.2." in name and "experts" in name and "down" in name],
        r"no tensor for model\.layers\.2\..*down_proj",
    ),
    "every up_proj of a layer is missing": (
        lambda t: [t.pop(name) for name in list(t) if "layers.2." in name and "experts" in name and "up_proj" in name],
        r"model\.layers\.2\..*gate_up_proj",
    ),
    "one expert has another shape": (lambda t: t.update({UP: torch.zeros(31, 64)}), "differ in shape or dtype"),
    "one expert has another dtype": (lambda t: t.update({UP: t[UP].bfloat16()}), "differ in shape or dtype"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "converted"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_experts_are_found_from_headers(damage: str, dtype: torch.dtype, tmp_path: Path) -> None:
    edit, message = DAMAGES[damage]
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), edit)
    with pytest.raises(CheckpointError, match=message):
        tiny.expert_map(tmp_path, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "converted"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("qwen3_moe", {"num_local_experts": 6}),
        ("qwen3_moe", {"num_local_experts": 16}),
        ("qwen3_moe", {"moe_intermediate_size": 24}),
        ("qwen3_moe", {"hidden_size": 32}),
        ("gpt_oss", {"num_local_experts": 6}),
        ("gpt_oss", {"intermediate_size": 48}),
        ("granitemoehybrid", {"intermediate_size": 24}),
    ],
)
def test_a_config_of_another_model_is_found_from_headers(
    name: str, values: dict[str, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    rewrite_config(tiny.save(tmp_path, name), **values)
    with pytest.raises(CheckpointError):
        tiny.expert_map(tmp_path, dtype)


def test_a_dense_model_has_no_experts() -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(NotMoEError, match='"llama" is a dense model'):
        find_experts(build_skeleton(config, torch.float32))


def test_experts_of_an_unknown_design_are_refused_by_name() -> None:
    class HomemadeExperts(nn.Module):
        pass

    model = nn.Module()
    model.config = SimpleNamespace(model_type="homemade")  # type: ignore[assignment]
    model.experts = HomemadeExperts()
    with pytest.raises(UnsupportedFamilyError, match=r'"homemade".*experts interface'):
        find_experts(model)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("{ not json", CheckpointError, "config.json"),
        (
            '{"model_type": "mixtral", "hidden_size": "many"}',
            CheckpointError,
            'its config.json cannot be used: hidden_size is "many"',
        ),
        ('{"model_type": "from_the_future"}', UnsupportedFamilyError, "from_the_future"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.X"}}', UnsupportedFamilyError, "--trust-remote-code"),
    ],
)
def test_a_bad_config_is_one_clear_line(config: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=message) as failure:
        read_checkpoint("model", tmp_path, ShardIndex({}, {}))
    assert "\n" not in str(failure.value)


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UnsupportedFamilyError, match='"vit" is not a decoder-only language model'):
        build_skeleton(read_config(tmp_path), torch.float32)


def test_the_dtype_to_compute_in() -> None:
    config = SimpleNamespace(dtype=torch.float16)
    assert resolve_dtype(config, "auto") is torch.float16
    assert resolve_dtype(SimpleNamespace(dtype=None), "auto") is torch.float32
    assert resolve_dtype(config, "bf16") is resolve_dtype(config, "bfloat16") is torch.bfloat16
    assert resolve_dtype(config, torch.float32) is torch.float32
    for junk in ("int8", "float8_e4m3fn", "bfloat", "nn", ""):
        with pytest.raises(ModelError, match="is not one of auto"):
            resolve_dtype(config, junk)
    for said in (torch.int8, torch.float8_e4m3fn, 5, 0, "auto"):
        with pytest.raises(ValueError, match="nothing to compute in"):
            resolve_dtype(SimpleNamespace(dtype=said), "auto")


def test_pieces_are_where_a_fused_tensor_holds_the_expert(tmp_path: Path) -> None:
    experts = tiny.expert_map(tiny.save(tmp_path, "gpt_oss"))
    shards = ShardIndex.from_folder(tmp_path)
    tensor = shards["model.layers.0.mlp.experts.down_proj"]
    (down,) = (p for p in experts.layers[0].parameters if p.name == "down_proj")
    share = tensor.nbytes // 8
    assert down.sources[0].piece(5, 100) == Piece(tensor.file, tensor.offset + 5 * share, share, 100)
