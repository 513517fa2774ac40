"""What the carve does to the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_demo
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cache.errors import CheckpointError
from offload.demo import build as demo
from offload.demo.carve import Carve
from offload.demo.gguf import LlamaGGUF


def test_with_every_expert_on_and_no_corrections_it_is_the_dense_model(tiny: tiny_demo.Tiny, tmp_path: Path) -> None:
    tiny_demo.carve(demo.DATA_FILE, top_k=tiny_demo.EXPERTS, correct=False, router_scale=2.0**-40)
    source = LlamaGGUF(tiny_demo.write_gguf(tmp_path / "dense.gguf"))
    model = LlamaForCausalLM(LlamaConfig(**source.config())).eval()
    state = {name: torch.from_numpy(source.tensor(name)).bfloat16().float() for name in tiny_demo.names()}
    state |= {name: torch.ones_like(value) for name, value in state.items() if "norm" in name}  # as the carve says
    model.load_state_dict(state, strict=False)
    carved = tiny_demo.load(demo.demo_path())
    assert type(carved).__name__ == "Qwen2MoeForCausalLM"
    ids = torch.arange(40)[None] % carved.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(carved(ids).logits, model(ids).logits, rtol=0, atol=2e-4)


def test_corrections_are_low_rank_terms_and_row_scales(tiny: tiny_demo.Tiny) -> None:
    carve = Carve(demo.DATA_FILE)
    raw = carve.tensors
    weight = torch.randn(tiny_demo.HIDDEN, tiny_demo.NEURONS)
    low = torch.zeros_like(weight)
    for rank in range(3):
        b = raw["down_proj.b"][1, :, rank].float() * raw["down_proj.b_step"][1, rank]
        a = raw["down_proj.a"][1, rank].float() * raw["down_proj.a_step"][1, rank]
        low += torch.outer(b, a)
    want = (weight + low) * (1 + raw["down_proj.scale"][1].float())[:, None]
    assert low.abs().max() > 0.005
    torch.testing.assert_close(carve.correct("down_proj", 1, weight), want)


def test_each_dense_neuron_lands_in_one_place(tiny: tiny_demo.Tiny, tmp_path: Path) -> None:
    """Without corrections, shared and routed gate rows together are the dense rows, each once."""
    tiny_demo.carve(demo.DATA_FILE, correct=False)
    source = LlamaGGUF(tiny_demo.write_gguf(tmp_path / "dense.gguf"))
    tensors = dict(Carve(demo.DATA_FILE).apply(source))
    assert len(tensors) == Carve(demo.DATA_FILE).tensor_count
    prefix = "model.layers.1.mlp."
    rows = [tensors[f"{prefix}shared_expert.gate_proj.weight"]]
    rows += [tensors[f"{prefix}experts.{e}.gate_proj.weight"] for e in range(tiny_demo.EXPERTS)]
    dense_rows = torch.from_numpy(source.tensor(f"{prefix}gate_proj.weight")).bfloat16()
    order = Carve(demo.DATA_FILE).order(1)
    assert torch.equal(torch.cat(rows), dense_rows[order])
    assert sorted(order.tolist()) == list(range(tiny_demo.NEURONS))


def test_a_carve_for_another_model_is_refused(tiny: tiny_demo.Tiny) -> None:
    class Other:
        def config(self) -> dict[str, Any]:
            return {"num_hidden_layers": 7, "intermediate_size": 11}

    with pytest.raises(CheckpointError, match="7 layers of 11 neurons"):
        next(Carve(demo.DATA_FILE).apply(Other()))  # type: ignore[arg-type]


def test_another_version_of_the_data_is_refused(tmp_path: Path) -> None:
    save_file({"order": torch.zeros(1)}, tmp_path / "old.safetensors", {"format": "offload-demo-carve", "version": "0"})
    with pytest.raises(CheckpointError, match=r"old\.safetensors"):
        Carve(tmp_path / "old.safetensors")


def test_the_packaged_data_is_small_and_sound() -> None:
    path = tiny_demo.ROOT / "offload" / "demo" / "demo-carve.safetensors"
    others = sum(each.stat().st_size for each in path.parent.iterdir() if not each.name.startswith("mixture-"))
    assert others < 8_000_000  # test_mixture.py weighs the mixture
    carve = Carve(path)
    assert (carve.experts, carve.top_k, carve.shared) == (16, 8, 512)
    for layer in range(30):
        assert sorted(carve.order(layer).tolist()) == list(range(1536))
    assert all(bool(tensor.isfinite().all()) for tensor in carve.tensors.values() if tensor.is_floating_point())
