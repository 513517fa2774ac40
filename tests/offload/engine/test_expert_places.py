"""Where an expert's matrices lie, found for real families and formats; computing by that is what experts do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grouped_reference
import pytest
import tiny
import torch
from families import families

from offload.engine.fused.places import Activation, ExpertPlaces, MatrixPlace, find_activation
from offload.engine.outputs import compute_expert
from offload.store.precisions import PrecisionStore
from offload.store.records import RecordSlice

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

PRECISIONS = ["auto", "int8", "nf4", "nested8", "nested4", "nested2"]


def opened(folder: Path, family: str, precision: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """A layer of a tiny model, its module, and the store of its experts for a GPU, which has nothing to read."""
    tiny.save(folder, family, dtype)
    experts = tiny.expert_map(folder, dtype)
    layer = experts.layers[0]
    return layer, layer.model.get_submodule(layer.path), PrecisionStore(experts, [precision], "cuda")


def fill(layer: Any, store: PrecisionStore, block: torch.Tensor) -> None:
    """Random experts in slots [count, slot_bytes]."""
    generator = torch.Generator().manual_seed(0)
    for slot in block:
        values = {p.name: torch.randn(p.shape, generator=generator).to(p.dtype) / 4 for p in layer.parameters}
        each = store.slices[0]
        if isinstance(each, RecordSlice):
            record = torch.zeros(each.layouts[0].record_bytes, dtype=torch.uint8)
            each.layouts[0].write(values, record)
            slot.copy_(record[: len(slot)])
        else:
            for name, view in layer.views(slot).items():
                view.copy_(values[name])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_found_by_slot_compute_what_experts_do(family: str, precision: str, tmp_path: Path) -> None:
    layer, module, store = opened(tmp_path, family, precision)
    nbytes = store.slot_bytes[0]
    places = ExpertPlaces.of(module, nbytes, lambda slot: store.weights(0, 0, [slot]))
    assert places is not None
    block = torch.zeros(4, nbytes, dtype=torch.uint8)
    fill(layer, store, block)
    x = torch.randn(3, places.gate_up.k, generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([[0, 2], [2, 1], [3, 0]], dtype=torch.int32)
    weights = torch.rand(3, 2, generator=torch.Generator().manual_seed(2))
    inner, out = torch.empty(6, places.down.k), torch.empty_like(x)
    grouped_reference.gate_up(x, slots, inner, block.view(-1), places)
    grouped_reference.down(inner, slots, weights, torch.empty(1), out, block.view(-1), places, complete=True)
    for token in range(3):
        expected = sum(
            compute_expert(module, x[token : token + 1], store.weights(0, 0, [block[slot]]))[0] * weight
            for slot, weight in zip(slots[token].tolist(), weights[token], strict=True)
        )
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-5)


def test_activations_are_found_by_trying_them() -> None:
    found = {
        name: find_activation(families()[name].build().get_submodule(path))
        for name, path in (("qwen3_moe", "model.layers.0.mlp.experts"), ("gpt_oss", "model.layers.0.mlp.experts"))
    }
    assert found["qwen3_moe"] == Activation(interleaved=False)
    assert found["gpt_oss"] == Activation(interleaved=True, alpha=1.702, limit=7.0)

    def module(apply: Any, **attributes: float) -> Any:
        return SimpleNamespace(_apply_gate=apply, **attributes)

    def gelu(y: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate) * up

    def limited(y: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.clamp(max=7.0)) * up

    def broken(y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on another device")

    assert find_activation(module(gelu)) is None
    assert find_activation(module(limited)) is None
    assert find_activation(module(limited, limit=7.0, alpha=1.0)) is None
    assert find_activation(module(broken)) is None
    backwards = Activation(interleaved=False, alpha=2.0, limit=3.0)
    assert find_activation(module(backwards, alpha=2.0, limit=3.0)) == backwards


def test_what_no_kernel_reads_has_no_place(tmp_path: Path) -> None:
    _, module, store = opened(tmp_path, "qwen3_moe", "auto")
    whole = store.weights(0, 0, [torch.empty(store.slot_bytes[0], dtype=torch.uint8, device="meta")])
    assert MatrixPlace.of(whole, "down_proj", transposed=False) is not None
    assert MatrixPlace.of({"down_proj": whole["down_proj"].double()}, "down_proj", transposed=False) is None
    assert MatrixPlace.of({"down_proj": whole["down_proj"][0]}, "down_proj", transposed=False) is None
    for flag in ("has_gate", "has_post_expert_norm"):
        other = SimpleNamespace(
            has_gate=flag != "has_gate",
            has_post_expert_norm=flag == "has_post_expert_norm",
            is_transposed=False,
            _apply_gate=module._apply_gate,
        )
        assert ExpertPlaces.of(other, store.slot_bytes[0], lambda slot: store.weights(0, 0, [slot])) is None
    packed = PrecisionStore(tiny.expert_map(tmp_path), ["nested4"], "cpu")
    assert ExpertPlaces.of(module, packed.slot_bytes[0], lambda slot: packed.weights(0, 0, [slot])) is None
