"""The files of other engines, and the comparison with them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from scripts.bench.make_checkpoint import write_checkpoint
from scripts.bench.workers import Worker
from scripts.peers import make_gguf
from scripts.peers.engines import Files, Pythons, Settings
from tests.scripts.small import needs_cgroup, run_benchmark, tiny, trace_of_three_layers

SMALL = {"hidden": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "intermediate": 32, "experts": 8, "top_k": 2}


@pytest.mark.parametrize("name", ["olmoe", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_gguf_tensors_are_the_checkpoint_s(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write_checkpoint(tiny(name), tmp_path / "model", shard_bytes=40_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(torch.float32)
    targets = {target.name: target for target in make_gguf.targets(make_gguf.Checkpoint(tmp_path / "model"))}

    def values(name: str) -> torch.Tensor:
        bits = np.concatenate([piece() for piece in targets[name].pieces]).reshape(targets[name].shape)
        return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))

    experts = model.model.layers[1].mlp.experts
    gate, up = values("blk.1.ffn_gate_exps.weight"), values("blk.1.ffn_up_exps.weight")
    if name == "gpt-oss-20b":
        interleaved = torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2)
        assert torch.equal(interleaved, experts.gate_up_proj)
        assert torch.equal(values("blk.1.ffn_down_exps.weight").transpose(1, 2), experts.down_proj)
        assert torch.equal(values("blk.1.ffn_up_exps.bias"), experts.gate_up_proj_bias[:, 1::2])
        assert not targets["blk.1.ffn_down_exps.bias"].is_matrix
        assert targets["blk.0.attn_sinks.weight"].shape == (4,)
    else:
        assert torch.equal(torch.cat([gate, up], dim=1), experts.gate_up_proj)
        assert torch.equal(values("blk.1.ffn_down_exps.weight"), experts.down_proj)
    assert torch.equal(values("blk.0.attn_q.weight"), model.model.layers[0].self_attn.q_proj.weight)
    assert targets["token_embd.weight"].is_matrix and not targets["blk.0.ffn_gate_inp.weight"].is_matrix
    written = sum(np.prod(target.shape) for target in targets.values())
    assert written == sum(parameter.numel() for parameter in model.parameters())


def test_a_gguf_file_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    write_checkpoint(tiny("qwen3-30b-a3b"), tmp_path / "model")
    checkpoint = make_gguf.Checkpoint(tmp_path / "model")
    for kind in make_gguf.TYPES:
        assert make_gguf.main([str(tmp_path / "model"), "--type", kind, "--out", str(tmp_path / kind)]) == 0
    with pytest.raises(ValueError, match="mixtral checkpoints cannot be converted"):
        write_checkpoint(tiny("mixtral-8x7b"), tmp_path / "mixtral")
        list(make_gguf.targets(make_gguf.Checkpoint(tmp_path / "mixtral")))

    import gguf

    for kind, most in (("BF16", 0), ("Q4_0", 0.02)):
        reader = gguf.GGUFReader(tmp_path / kind)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        found = gguf.quants.dequantize(stored["blk.0.attn_k.weight"].data, stored["blk.0.attn_k.weight"].tensor_type)
        bits = checkpoint["model.layers.0.self_attn.k_proj.weight"]
        assert np.abs(found - (bits.astype(np.uint32) << 16).view(np.float32)).max() <= most
        assert reader.get_field("qwen3moe.expert_used_count").contents() == 2


@pytest.mark.skipif(not (find_spec("llama_cpp") and find_spec("gguf")), reason="no llama-cpp-python and gguf")
def test_llama_holds_everything_or_maps_its_file(tmp_path: Path) -> None:
    files = Files("olmoe", 2, tmp_path / "olmoe", small=SMALL)
    files.write(copies=1)
    here = Pythons(Path(sys.executable), Path(sys.executable))
    assert files.prepare("llama.cpp-bf16", here) is None
    chosen = []
    for memory_bytes in (None, 1 << 30):
        command = files.command("llama.cpp-bf16", here, Settings(1, 64, memory_bytes, ubatch=16))
        with Worker("llama.cpp", command) as worker:
            assert len(worker.ask(ids=list(range(40)), prefill=True)["seconds"]) == 1
            chosen.append(worker.ask(ids=list(range(8)))["chosen"])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 8


@pytest.mark.full
def test_everything_resident_at_two_levels(tmp_path: Path) -> None:
    options = ("--tokens", 6, "--warm-up", 4, "--repetitions", 2, "--prompts", 5, 12, "--layers", 2, "--at-most-s", 60)
    levels = ("--resident", "--fractions", "none", "--llama-python", "avx2=/nowhere", "native=/nowhere/else")
    where = ("--work", tmp_path / "work", "--out", tmp_path / "peers.md", "--ours", "prefetch_depth=1")
    result = run_benchmark("peers/bench", "--quick", "--tiny", "--bits", 16, *options, *levels, *where)
    low, high = result["cases"]
    assert low["level"] == "avx2" and high["level"].startswith("native (")
    assert "read_ahead_kb" in result
    for case in (low, high):
        assert case["resident"] and case["memory_bytes"] is None and case["trace"] is None
        assert case["decode_tokens_per_s"].keys() == {"ours-bf16", "llama.cpp-bf16", "transformers"}
        assert case["same_choices"]["ours-bf16"] == case["same_choices"]["transformers"] == [12, 12]
        assert list(case["prompt_tokens_per_s"]) == ["5", "12"]
        assert all(speeds["ours-bf16"] > 0 for speeds in case["prompt_tokens_per_s"].values())
        assert case["ours"]["hit_rate"] == 1 and case["peak_bytes"]["ours-bf16"] > 1e8
    assert low["unable"] == {"llama.cpp-bf16": "/nowhere: No such file or directory"}
    assert "16 bits, everything in RAM" in (tmp_path / "peers.md").read_text()


@pytest.mark.full
@needs_cgroup
def test_the_peer_benchmark_without_peers(tmp_path: Path) -> None:
    trace_of_three_layers(tmp_path / "trace.safetensors")
    options = ("--tokens", 6, "--warm-up", 4, "--repetitions", 2, "--prompts", 12, "--layers", 2, "--at-most-s", 60)
    nowhere = ("--llama-python", tmp_path / "llama", "--airllm-python", tmp_path / "airllm")
    where = ("--trace", tmp_path / "trace.safetensors", "--work", tmp_path / "work", "--out", tmp_path / "peers.md")
    result = run_benchmark("peers/bench", "--quick", "--tiny", "--memory", "1500M", *options, *nowhere, *where)
    speeds = result["decode_tokens_per_s"]
    missing = {"llama.cpp-bf16", "llama.cpp-q4_0", "airllm"}
    assert {name for name, speed in speeds.items() if speed is None} == missing
    assert {"ours-bf16", "ours-nf4", "accelerate", "transformers"} == speeds.keys() - missing
    for case in result["cases"]:
        routed_by_trace = case["trace"] is not None
        quantised = case["group"] == "4.5 bits"
        same = case["same_choices"]
        if quantised:
            assert same["ours-nf4"][1] == 12
        else:
            assert same["ours-bf16"] == same["accelerate"] == same["transformers"] == [12, 12]
            why = "its router cannot be driven" if routed_by_trace else f"{tmp_path}/airllm: No such file or directory"
            assert case["unable"]["airllm"] == why
        assert case["ours"]["touched_bytes_per_token"] > 0
        assert case["prompt_tokens_per_s"].keys() == {"12"}
    assert [case["trace"] for case in result["cases"]] == [None, "trace.safetensors"] * 2
    assert not list((tmp_path / "work").iterdir())
    assert "routed by trace.safetensors" in (tmp_path / "peers.md").read_text()
