"""Benchmarks on small models."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cache.traces.trace import Trace
from scripts.bench import prediction
from scripts.bench.make_checkpoint import write_checkpoint
from tests.cache.machines import machine
from tests.scripts.small import ROOT, linux, needs_cgroup, run_benchmark, tiny, trace_of_three_layers


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_prefetch_benchmark(tmp_path: Path, device: str) -> None:
    checkpoint = tmp_path / "model"
    write_checkpoint(tiny("qwen3-30b-a3b", experts=16), checkpoint, shard_bytes=100_000, embedding_std=4)
    sizes = "--repetitions", 1, "--tokens", 4, "--warm-up", 3, "--expert-cache", "100KB"
    machine().write(tmp_path / "machine.json")
    also = "--machine", tmp_path / "machine.json"
    result = run_benchmark("bench/prefetch", checkpoint, "--device", device, *sizes, *also)
    assert result["gate_recall"]["1"]["2K"] >= result["gate_recall"]["1"]["K"] > 0
    rows = {(row["predictor"], row["depth"]): row for row in result["rows"]}
    assert {"none", "frequency", "cross-layer-gate", "oracle"} == {predictor for predictor, _ in rows}
    assert rows["none", 0]["speedup"] == 1 and rows["none", 0]["prefetches_per_token"] == 0
    assert all(row["s_per_token"] > 0 for row in rows.values())
    assert ("saturated" in result) == (device == "emulated")

    for row in (*result["rows"], *result.get("saturated", ())):
        assert row["predicted_s_per_token"] > 0


def test_the_disk_benchmark(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(12_000_000))
    rows = run_benchmark("bench/disk", tmp_path, "--repetitions", 1, "--seconds", 0.005)["rows"]
    assert {"direct", "buffered", "mapped"} <= {row["way"] for row in rows}
    assert all(row["bytes_per_s"] > 0 for row in rows)


def test_the_benchmark_of_misses(tmp_path: Path) -> None:
    write_checkpoint(tiny("qwen3-30b-a3b", experts=16), tmp_path / "model", shard_bytes=100_000)
    options = "--experts", "int4", "--expert-cache", "100KB", "--tokens", 4, "--warm-up", 3, "--disk-bytes", 100_000
    result = run_benchmark("bench/misses", tmp_path / "model", "--stores", tmp_path, "--repetitions", 2, *options)
    assert result["ready"]["hit_rate"] == result["plain"]["hit_rate"] < 1
    assert min(result[kind][key] for kind in ("plain", "ready") for key in result[kind] if key != "hit_rate") > 0
    assert result["ready_speed_up"] > 0


@pytest.mark.full
def test_the_scaling_benchmark(tmp_path: Path) -> None:
    sizes = "--layers", 2, "--hidden", 64, "--intermediate", 32, "--vocab", 128, "--tokens", 6
    often = "--repetitions", 1, "--starts", 1, "--experts", 8, 16
    result = run_benchmark("bench/scaling", "--folder", tmp_path, *sizes, *often)
    for plan, hit_rate in (("eight", 1), ("all", 1), ("missing", 0.5)):
        assert [(row["experts"], row["hit_rate"]) for row in result["decode"][plan]] == [(8, hit_rate), (16, hit_rate)]
        assert result["decode"][plan][0]["ratio"] == 1
    small, large = result["start"]["16"], result["start"]["16 large"]
    assert large["checkpoint_bytes"] > 2 * small["checkpoint_bytes"]
    assert large["read_bytes"] - small["read_bytes"] < 10_000  # headers, and no weights of experts
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@linux
def test_the_benchmark_of_prompts(checkpoint: Path) -> None:
    sizes = "--prompts", 40, "--chunk", 16, "--repetitions", 2, "--disk-bytes", 100_000
    (row,) = run_benchmark("bench/prefill", checkpoint, *sizes)["rows"]
    assert row["ways"].keys() == {"streamed", "kept", "on-demand"} and row["compute_s"] > 0
    for way in row["ways"].values():
        assert way["tokens_per_s"] > 0 and way["share_of_limit"] > 0 and way["peak_bytes"] <= way["budget_bytes"]
    assert row["ways"]["on-demand"]["ratio"] == 1


@pytest.mark.full
def test_the_benchmark_of_divided_layers(tmp_path: Path) -> None:
    write_checkpoint(tiny("qwen3-30b-a3b", layers=3), tmp_path / "model", shard_bytes=200_000)
    trace_of_three_layers(tmp_path / "trace")
    sizes = "--fill", 3, "--settle", 2, "--tokens", 4, "--repetitions", 2, "--links", "1GB/s", "3GB/s"
    result = run_benchmark("bench/split", tmp_path / "model", "gpu-only", "auto", "--trace", tmp_path / "trace", *sizes)
    assert result["links"].keys() == {"1GB/s", "3GB/s"}
    for link in result["links"].values():
        assert link["schedulers"]["gpu-only"]["on_cpu"] == 0
        assert max(row["of_best"] for row in link["schedulers"].values()) == 1
        assert link["costs_s"]["copy"] > 0


@pytest.mark.full
@needs_cgroup
def test_the_benchmark_of_precisions(tmp_path: Path) -> None:
    write_checkpoint(tiny("qwen3-30b-a3b", layers=3), tmp_path / "model", shard_bytes=200_000)
    trace_of_three_layers(tmp_path / "trace")
    sizes = "--memory", "2G", "--cpu-mem", "1900M", "--tokens", 4, "--warm-up", 3, "--repetitions", 2
    options = "--trace", tmp_path / "trace", *sizes
    result = run_benchmark("bench/precision", tmp_path / "model", "auto", "int8", *options)
    shares = {name: row["precision_shares"] for name, row in result["configurations"].items()}
    assert shares == {"auto": {"bf16": 1}, "int8": {"int8": 1}}
    assert max(result["cgroup_peak_bytes"].values()) <= 2 << 30


def test_the_scheduler_benchmark() -> None:
    result = run_benchmark("bench/schedulers", "--layers", 40)
    rows = result["schedulers"]
    assert rows["optimal"]["worst"] == rows["optimal"]["optimal_share"] == 1
    assert {"dali", "hybrimoe(paper=True)"} < rows.keys()
    assert all(1 <= row["mean"] <= row["worst"] for row in rows.values())
    again = run_benchmark("bench/schedulers", "--layers", 40, "--rules", "dali")["schedulers"]["dali"]
    assert {**again, "microseconds": 0} == {**rows["dali"], "microseconds": 0}
    mixed = run_benchmark("bench/schedulers", "--layers", 40, "--mixed", "--rules", "dali")
    assert mixed["mixed"] and mixed["schedulers"]["dali"]["mean"] != again["mean"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tiny("qwen3-30b-a3b"), tmp_path / "model", shard_bytes=200_000)
    return tmp_path / "model"


@pytest.mark.full
@needs_cgroup
def test_the_loading_benchmark(checkpoint: Path) -> None:
    result = run_benchmark("bench/load", checkpoint, "--memory", "2GB", "--tokens", 8)
    assert result["within_budget"]
    for name in ("cpu", "cgroup", "emulated"):
        run = result["runs"][name]
        assert run["generated"] == 8
        assert run["peak_rss_bytes"] <= run["budget_bytes"]
        assert run["stats"]["decode_tokens"] == 7
    assert result["runs"]["cgroup"]["cgroup_peak_bytes"] <= 2_000_000_000


@pytest.mark.full
@needs_cgroup
def test_the_decoding_benchmark(checkpoint: Path) -> None:
    options = ("--tokens", 6, "--warm-up", 4, "--repetitions", 2, "--disk-bytes", 1 << 20)
    result = run_benchmark("bench/decode", checkpoint, *options)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model"]
    assert len(result["repetitions"]) == 2
    assert result["same_choice_as_accelerate"] == 1
    for row in result["repetitions"]:
        assert row["ratio_to_accelerate"] == pytest.approx(row["offload_tokens_per_s"] / row["accelerate_tokens_per_s"])
        assert row["share_of_limit"] == pytest.approx(row["offload_tokens_per_s"] / row["limit_tokens_per_s"])
        assert 1 / row["limit_tokens_per_s"] == pytest.approx(
            row["dense_s_per_token"] + row["missed_bytes_per_token"] / row["disk_bytes_per_s"]
        )
    assert set(result["cgroup_peak_bytes"]) == {"offload", "accelerate", "dense"}


@pytest.mark.full
@linux
def test_a_step_beside_plain_transformers(checkpoint: Path) -> None:
    options = ("--tokens", 6, "--prompt", 32, "--repetitions", 3, "--engines", "ours-bf16", "transformers")
    result = run_benchmark("bench/step", checkpoint, *options)
    assert result["ours-bf16"]["same_choice"] == 1
    assert result["ours-bf16"]["ratio"] > 0 and result["ours-bf16"]["prefill_ratio"] > 0
    assert result["ours-bf16"]["s_per_token"] > 0
    assert result["transformers"]["ratio"] == 1


def test_the_benchmark_of_a_step(checkpoint: Path) -> None:
    options = ("--engines", "ours-bf16", "--against", ROOT, "--tokens", 3, "--repetitions", 2, "--threads", 1)
    result = run_benchmark("bench/step", checkpoint, *options)
    assert result["ours-bf16"].keys() == result["ours-bf16, before"].keys()
    assert result["ours-bf16, before"]["ratio"] == result["ours-bf16, before"]["prefill_ratio"] == 1
    assert result["ratios"].keys() == {"ours-bf16"}
    assert 0 < result["ours-bf16"]["share_of_memory"] < 2 and result["ratios"]["ours-bf16"] > 0


@linux
@pytest.mark.full
def test_the_replay_benchmark(tmp_path: Path) -> None:
    trace_of_three_layers(tmp_path / "trace.safetensors")
    result = run_benchmark(
        "bench/replay", tmp_path / "trace.safetensors", "--repetitions", 2, "--policies", "lru", "mrs"
    )
    assert result["accesses"] == 600
    assert result["slots"] == 2
    assert result["ten"] == [1, 2, 3, 4, 5, 6, 7]
    for row in result["policies"].values():
        assert row["accesses_per_s"] > 0
        assert row["accesses_per_s_at_ten"] > 0


def test_the_benchmark_of_policies() -> None:
    costs = run_benchmark("bench/policies", "--repetitions", 1, "--policies", "lru", "fifo")["microseconds_an_event"]
    assert costs.keys() == {"lru", "fifo"}
    assert all(cost > 0 for pools in costs.values() for cost in pools.values())


def test_the_benchmark_of_predictors() -> None:
    chosen = "--predictors", "frequency", "oracle", "--rules", "ours"
    costs = run_benchmark("bench/predictor_cost", "--repetitions", 1, "--tokens", 8, *chosen)["microseconds_an_event"]
    assert {kind: set(rows) for kind, rows in costs.items()} == {"predictor": {"frequency", "oracle"}, "rule": {"ours"}}
    shapes = {"24 x 32 top-4", "48 x 128 top-8"}
    assert all(row.keys() == shapes and min(row.values()) > 0 for rows in costs.values() for row in rows.values())


def test_the_benchmark_of_overhead() -> None:
    result = run_benchmark("bench/overhead", "--repetitions", 3, "--intermediate", 32)
    for precision in ("auto", "nf4"):
        assert result[precision]["hit_rate"] == 1
        assert result[precision]["ours_us"] > 0 and result[precision]["bare_us"] > 0


def test_the_benchmark_of_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prediction.FAMILIES, "tiny", tiny("qwen3-30b-a3b"))
    monkeypatch.setattr(prediction, "VOCAB", 128)
    monkeypatch.setattr(prediction, "CONFIGURATIONS", [("tiny", prediction.CPU, "--expert-cache 60K")])
    machine().write(tmp_path / "machine-3GB.json")
    args = {"tokens": 4, "prompt": 3, "repetitions": 2, "folder": tmp_path, "trace": None, "measure": False, "only": ""}
    result = prediction.benchmark(argparse.Namespace(**args))
    row = result["rows"]["tiny, cpu, --expert-cache 60K"]
    assert row["error"] == row["predicted"] / row["measured"] - 1 == result["median_signed_error"]
    assert len(Trace.open(tmp_path / "tiny.safetensors").sequence_offsets) == 4


def test_tables_of_replays(tmp_path: Path) -> None:
    row = {"trace": "a/b.safetensors", "pool": "layer", "warm": False, "accesses": 1000, "profile": None}
    row |= {"causal": True, "admission": "always", "gap_closed_bypass": None}
    figures = (("lru", "25%", 500, None), ("lru", "50%", 700, None), ("recall", "25%", 600, 0.5))
    rows = [
        {**row, "policy": policy, "capacity": capacity, "hits": hits, "hit_rate": hits / 1000, "gap_closed": gap}
        for policy, capacity, hits, gap in (*figures, ("recall", "50%", 800, 0.7))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, ROOT / "scripts/bench/replay.py", "--tables", tmp_path / "rows.json"]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    assert said[0] == "b.safetensors, layer pool, cold, 1,000 accesses"
    assert said[2:6] == [
        "| policy | 25% | 50% |",
        "| --- | --- | --- |",
        "| `recall` | 0.6000 (50%) | 0.8000 (70%) |",
        "| `lru` | 0.5000 | 0.7000 |",
    ]


@linux
def test_what_a_layout_of_experts_would_save(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(6_000_000))
    trace_of_three_layers(tmp_path / "trace")
    result = run_benchmark("bench/disk", tmp_path, "--neighbours", tmp_path / "trace", "--repetitions", 2)
    assert result["saved"].keys() == {"1", "2", "4"}
    for saved in result["saved"].values():
        assert 0 <= saved["hit_rate"] < 1
        assert saved["missed_together"] >= 0 and saved["as_numbered"] >= 0
    assert all(times["apart_s"] > 0 for times in result["times"].values())
