"""Everything but the experts is loaded exactly as transformers does, and the experts' bytes are never touched."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, GenerationConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoePreTrainedModel

from cache.errors import CheckpointError, TransferError
from offload.checkpoint.config.tokenizer import load_tokenizer
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.mapping import map_experts
from offload.checkpoint.parameter import Piece
from offload.checkpoint.shards import ShardIndex
from offload.checkpoint.skeleton import build_skeleton, expert_parameters
from offload.engine.hook import IMPLEMENTATION
from offload.layers.loading import load_dense
from offload.store.files import FileReader
from scripts.fuzz.tokenizer import tiny_tokenizer

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

NAMES = ("qwen3_moe", "gpt_oss", "nemotron_h", "granitemoehybrid", "deepseek_v3", "inkling2_text")


def load(folder: Path, dtype: torch.dtype = torch.float32, on_read: Any = None) -> tuple[Any, ExpertMap]:
    config = AutoConfig.from_pretrained(folder)
    experts = map_experts(build_skeleton(config, dtype), ShardIndex.from_folder(folder))
    return load_dense(folder, config, experts, dtype, torch.device("cpu"), IMPLEMENTATION, on_read), experts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stored", "loaded"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_dense_weights_are_those_of_transformers(
    name: str, stored: torch.dtype, loaded: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path, name, stored)
    ranges: list[Piece] = []
    read = FileReader.read

    def recording(self: FileReader, pieces: Sequence[Piece], destination: Any) -> int:
        ranges.extend(pieces)
        return read(self, pieces, destination)

    monkeypatch.setattr(FileReader, "read", recording)
    told: list[int] = []
    model, experts = load(tmp_path, loaded, told.append)
    resident = tiny.resident(tmp_path, loaded)

    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    expected = dict(resident.named_parameters()) | dict(resident.named_buffers())
    routed = {
        f"{layer.path}.{parameter}"
        for layer in experts.layers
        for parameter in expert_parameters(resident.get_submodule(layer.path))
    }
    assert tensors.keys() == expected.keys() - routed
    assert [key for key in tensors if not tiny.same_bits(tensors[key], expected[key])] == []
    assert [key for key, tensor in tensors.items() if tensor.data_ptr() % 64 and tensor.numel() > 1] == []
    # torch chooses its kernels by it.
    assert [key for key, tensor in tensors.items() if tensor.requires_grad != expected[key].requires_grad] == []
    assert not any(module.training for module in model.modules())

    # What was read is dense tensors, whole, each at most once.
    dense = {(info.file, info.offset, info.nbytes) for info in experts.dense.values()}
    spans = [(piece.file, piece.offset, piece.nbytes) for piece in ranges]
    assert set(spans) <= dense and len(spans) == len(set(spans))
    assert sorted(told) == sorted(nbytes for _, _, nbytes in spans)


def test_weights_that_change_while_they_are_loaded(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    shard = tmp_path / "model.safetensors"

    def touch(nbytes: int) -> None:
        os.utime(shard, ns=(1, 1))

    with pytest.raises(TransferError, match=f"{shard} was changed while the model was running"):
        load(tmp_path, on_read=touch)


def test_expert_weights_take_no_memory(tmp_path: Path) -> None:
    model, experts = load(tiny.save(tmp_path, "qwen3_moe"))
    for layer in experts.layers:
        module = model.get_submodule(layer.path)
        assert module.gate_up_proj.is_meta and module.down_proj.is_meta
        assert dict(module.named_parameters()) == {}


@pytest.mark.parametrize("tie", [True, False])
def test_ties_are_kept(tie: bool, tmp_path: Path) -> None:
    model, _ = load(tiny.save(tmp_path, "qwen3_moe", tie_word_embeddings=tie))
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert shared is tie
    if tie:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_do_not_lie_in_mapped_files(tmp_path: Path) -> None:
    model, _ = load(tiny.save(tmp_path, "qwen3_moe"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    shard = tmp_path / "model.safetensors"
    with shard.open("r+b") as file:
        file.write(bytes(shard.stat().st_size))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_generation_defaults_come_along(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    GenerationConfig(top_k=7, temperature=0.3, do_sample=True, eos_token_id=[2, 9]).save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert (model.generation_config.top_k, model.generation_config.eos_token_id) == (7, [2, 9])
    (tmp_path / "generation_config.json").unlink()
    model, _ = load(tmp_path)
    assert model.generation_config.top_k != 7


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"])
def test_a_missing_dense_weight_is_named(name: str, tmp_path: Path) -> None:
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"1 weights of the model are not in the checkpoint, {name}"):
        load(tmp_path)


def test_a_dense_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), lambda tensors: tensors.update({name: torch.zeros(32, 64)}))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + r".*\[32, 64\].*\[64, 64\]") as failure:
        load(tmp_path)
    assert "\n" not in str(failure.value)


def test_tensors_of_no_module_are_ignored_unread(tmp_path: Path) -> None:
    """Such as the layers for multi-token prediction that some checkpoints bring."""
    extra = {"model.layers.3.extra.weight": torch.zeros(10, 10), "mtp.weight": torch.zeros(5)}
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), lambda tensors: tensors.update(extra))
    told: list[int] = []
    load(tmp_path, on_read=told.append)
    assert not set(told) & {400, 20}


@pytest.mark.parametrize("fails", [False, True])
def test_transformers_is_as_it_was_after_loading(fails: bool, tmp_path: Path) -> None:
    from transformers.utils import logging

    tiny.save(tmp_path, "qwen3_moe")
    if fails:
        tiny.edit_tensors(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    logging.set_verbosity_info()
    before = Qwen3MoeExperts.__init__, logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        load(tmp_path)
    except CheckpointError:
        assert fails
    else:
        assert not fails
    assert before == (Qwen3MoeExperts.__init__, logging.get_verbosity(), logging.is_progress_bar_enabled())
    logging.set_verbosity_error()
    if not fails:  # and a resident model can be built
        assert not tiny.resident(tmp_path).model.layers[0].mlp.experts.down_proj.is_meta


def test_code_that_initialises_by_torchs_own_functions_leaves_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As code that comes with a model may; transformers' own looks first whether a tensor was read."""

    def rough(self: Any, module: torch.nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            torch.nn.init.zeros_(parameter)

    before, _ = load(tiny.save(tmp_path, "qwen3_moe"))
    monkeypatch.setattr(Qwen3MoePreTrainedModel, "_init_weights", rough)
    after, _ = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_the_config_on_disk_is_left_alone(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    load(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert json.loads(before["config.json"])["model_type"] == "qwen3_moe"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_tokenizer_in_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    folder = (tmp_path / "model").rename(tmp_path / os.fsdecode(b"m\xffdel"))
    assert load_tokenizer(folder)("abc")["input_ids"] == tiny_tokenizer()("abc")["input_ids"]
