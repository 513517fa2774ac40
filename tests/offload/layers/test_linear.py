"""`--dense`: linear layers that belong to no expert, quantised while they are loaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import families
from torch import nn
from torch.nn import functional
from transformers import AutoConfig

from cache.errors import FormatError, UnsupportedFamilyError
from cache.types import Tier
from offload.checkpoint.mapping import map_experts
from offload.checkpoint.shards import ShardIndex
from offload.checkpoint.skeleton import build_skeleton
from offload.engine.hook import IMPLEMENTATION
from offload.layers import linear as quantised_linear
from offload.layers.linear import DENSE_FORMATS, DenseLinears, QuantisedLinear
from offload.layers.loading import load_dense
from offload.model import OffloadedModel
from offload.options import PlanOptions
from offload.plan.budgets import Plan
from offload.plan.prepare import make_plan

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

QUICK = {
    "qwen2_moe": "a gated shared expert, biases",
    "deepseek_v3": "compressed attention",
    "jamba": "multiplies by a layer's weight itself",
    "muse_spark": "images and sound beside",
}


def quantised(model: OffloadedModel) -> dict[str, QuantisedLinear]:
    return {path: part for path, part in model.module.named_modules() if isinstance(part, QuantisedLinear)}


def decoded(weight: torch.Tensor, dense: str) -> torch.Tensor:
    """What a matrix is in a format."""
    form = DENSE_FORMATS[dense]
    return form.decode(form.encode(weight), *weight.shape, form.levels[0], weight.dtype)


def logits(model: Any) -> torch.Tensor:
    """Of a prompt and of four tokens after it, [13, vocabulary]."""
    ids = tiny.ids(1, 13)
    with torch.no_grad():
        output = model(ids[:, :9], use_cache=True)
        rows = [output.logits[0]]
        for token in ids[0, 9:]:
            output = model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
            rows.append(output.logits[0])
    return torch.cat(rows)


def check_family(name: str, folder: Path) -> None:
    """Offloaded at int8, a model says what transformers' says when its weights are those that int8 stands for."""
    tiny.save(folder, name)
    resident = tiny.resident(folder)
    with tiny.open_model(folder, dense="int8") as model:
        layers = quantised(model)
        assert layers
        for path in layers:
            linear = resident.get_submodule(path)
            linear.weight.data = decoded(linear.weight.data, "int8")
        torch.testing.assert_close(logits(model), logits(resident), rtol=1e-3, atol=1e-3)
        assert model.generate(tiny.ids(1, 4), max_new_tokens=3, min_new_tokens=3).shape == (1, 7)


@pytest.mark.parametrize("name", QUICK)
def test_a_family_computes_with_the_quantised_weights(name: str, tmp_path: Path) -> None:
    check_family(name, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", families())
def test_every_family_computes_with_the_quantised_weights(name: str, tmp_path: Path) -> None:
    try:
        check_family(name, tmp_path)
    except UnsupportedFamilyError:
        assert families()[name].may_be_refused


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", DENSE_FORMATS)
def test_blocks_of_rows_are_one_product(
    dense: str, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised_linear, "NUMBERS_AT_ONCE", 128 * 64)
    torch.manual_seed(0)
    linear = nn.Linear(128, 160, bias=bias, dtype=dtype)
    layer = QuantisedLinear(linear, DENSE_FORMATS[dense], "cpu")
    for block in layer.blocks:
        block.to_empty(device="cpu")
    reads: list[tuple[int, int]] = []

    def read(first: int, last: int) -> torch.Tensor:
        reads.append((first, last))
        return linear.weight.data[first:last]

    layer.fill(read)
    assert reads == [(0, 64), (64, 128), (128, 160)]
    x = torch.randn(2, 3, 128, dtype=dtype)
    with torch.no_grad():
        expected = functional.linear(x, decoded(linear.weight.data, dense), linear.bias)
        assert layer(x).dtype == dtype
        torch.testing.assert_close(layer(x), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", DENSE_FORMATS)
def test_autocast_casts_what_goes_in_and_nothing_within(dense: str, to: torch.dtype) -> None:
    """A kernel's own products are in the dtype it chose: bfloat16 for the weights of some formats."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=False)
    layer = QuantisedLinear(linear, DENSE_FORMATS[dense], "cpu")
    layer.blocks[0].to_empty(device="cpu")
    layer.fill(lambda first, last: linear.weight.data[first:last])
    for rows in (1, 100):
        x = torch.randn(rows, 128)
        with torch.no_grad():
            expected = layer(x.to(to))
            with torch.autocast("cpu", to):
                found = layer(x)
        assert found.dtype is to
        assert tiny.same_bits(found, expected)


@pytest.mark.parametrize("dense", ["int8", "nf4"])
def test_logits_stay_close(dense: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    plain = logits(tiny.resident(tmp_path))
    with tiny.open_model(tmp_path, dense=dense) as model:
        gap = float((logits(model) - plain).std() / plain.std())
    assert 0 < gap < {"int8": 0.03, "nf4": 0.4}[dense]


@pytest.mark.parametrize("dense", ["int8", "nf4"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_the_cache_changes_nothing(dense: str, device: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2_moe", torch.bfloat16)
    with tiny.open_model(tmp_path, dense=dense, device=device) as model:
        expected = logits(model)
    for nbytes in (1, "40K"):
        with tiny.open_model(tmp_path, dense=dense, device=device, expert_cache=nbytes) as model:
            assert tiny.same_bits(logits(model), expected)
            assert model.stats.as_dict()["misses"] > 0


def test_routers_gates_norms_and_embeddings_stay(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2_moe", tie_word_embeddings=False)
    with tiny.open_model(tmp_path, dense="nf4") as model:
        names = {path.removeprefix("model.layers.") for path in quantised(model)}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert names == {f"{layer}.{name}" for layer in range(3) for name in attention | shared} | {"lm_head"}


def test_a_tied_head_stays(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    with tiny.open_model(tmp_path, dense="int8") as model:
        assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
        assert "lm_head" not in quantised(model)


def dense_bytes(plan: Plan) -> int:
    (item,) = (item for item in plan.items if item.what == "dense weights")
    return item.nbytes


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("dense", DENSE_FORMATS)
def test_the_plan_counts_what_is_loaded(dense: str, device: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2_moe")
    plain = make_plan(tmp_path, PlanOptions(cpu_mem="8G", device="cpu", context=64))
    with tiny.open_model(tmp_path, dense=dense, device=device) as model:
        inner = model.module
        loaded = {tensor.data_ptr(): tensor.nbytes for tensor in (*inner.parameters(), *inner.buffers())}
        assert dense_bytes(model.plan) == sum(loaded.values()) < dense_bytes(plain)
        (item,) = (item for item in model.plan.items if item.what == "dense weights")
        what = "all that is no expert" if device == "emulated" else "all but experts and token embeddings"
        assert item.note == f"{what}, {len(quantised(model))} linear layers at {dense}"
        assert item.tier is (Tier.GPU if device == "emulated" else Tier.CPU)
        assert model.plan.slots(item.tier) > 0


def test_the_workspace_has_room_for_what_a_product_unpacks(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16, tie_word_embeddings=False)
    with tiny.open_model(tmp_path, dense="nf4") as model:
        inner, chunk = model.module, model.plan.chunk
        (workspace,) = (item.nbytes for item in model.plan.items if item.what == "workspace")
        with torch.no_grad(), tiny.PeakBytes((*inner.parameters(), *inner.buffers())) as memory:
            cache = inner(tiny.ids(1, chunk), use_cache=True, logits_to_keep=1).past_key_values
    assert memory.peak <= workspace + sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_no_matrix_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So loading takes as little at full precision, however large a layer is."""
    monkeypatch.setattr(quantised_linear, "NUMBERS_AT_ONCE", 64 * 64)
    tiny.save(tmp_path, "qwen3_moe", tie_word_embeddings=False)
    config = AutoConfig.from_pretrained(tmp_path)
    skeleton = build_skeleton(config, torch.float32)
    experts = map_experts(skeleton, ShardIndex.from_folder(tmp_path))
    linears = DenseLinears.of(skeleton, experts, torch.float32, DENSE_FORMATS["int8"], "cpu")
    told: list[int] = []
    load_dense(tmp_path, config, experts, torch.float32, torch.device("cpu"), IMPLEMENTATION, told.append, linears)
    head = config.vocab_size * config.hidden_size * 4
    assert told.count(head) == 1  # the embedding's
    assert sum(told) == sum(info.nbytes for info in experts.dense.values())
    assert told.count(64 * 64 * 4) >= head // (64 * 64 * 4)


def test_the_checkpoint_may_have_other_names(tmp_path: Path) -> None:
    """A shard of the base model alone has no prefix, for one."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe", tie_word_embeddings=True), rename)
    with tiny.open_model(tmp_path, dense="int8") as model:
        assert len(quantised(model)) == 3 * 4
        assert torch.isfinite(logits(model)).all()


def test_a_format_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match='--dense "int5": choose one of auto, bf16, int8, nf4'):
        make_plan(tiny.save(tmp_path, "qwen3_moe"), PlanOptions(dense="int5"))


def test_a_format_that_saves_nothing_is_said_to(tmp_path: Path) -> None:
    plan = make_plan(
        tiny.save(tmp_path, "qwen3_moe", torch.bfloat16), PlanOptions(cpu_mem="8G", device="cpu", dense="bf16")
    )
    assert plan.notes == ("--dense bf16 has no effect: no linear layer of this model would be smaller",)


def test_quantised_layers_lie_in_one_region(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    with tiny.open_model(tmp_path, dense="int8") as model:
        buffers = [
            buffer
            for module in model.module.modules()
            if isinstance(module, QuantisedLinear)
            for buffer in module.buffers()
        ]
        assert len(buffers) > 4 and len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == 1
        places = sorted((buffer.data_ptr(), buffer.nbytes) for buffer in buffers)
        assert all(at % 64 == 0 for at, _ in places)
        assert all(at + size <= next_ for (at, size), (next_, _) in itertools.pairwise(places))
