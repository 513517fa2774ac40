"""The maintainer's scripts: random checkpoints, memory cgroups, benchmarks, the documentation check."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from cache.errors import DeviceError, DiskSpaceError, OffloadError
from scripts.bench import cgroup, common, make_checkpoint, serve
from scripts.bench.families import FAMILIES, Family, tensors
from scripts.bench.make_checkpoint import write_checkpoint
from scripts.docs import check as check_docs
from scripts.peers import make_gguf
from tests.cache.machines import machine

SCRIPTS = Path(common.__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
NO_CGROUP = cgroup.unavailable()
needs_cgroup = pytest.mark.skipif(NO_CGROUP is not None, reason=f"no memory cgroup: {NO_CGROUP}")


def tiny(name: str, **changes: object) -> Family:
    """The family's layout with small dimensions."""
    small: dict[str, object] = {
        "hidden": 64,
        "heads": 4,
        "kv_heads": 4 if name == "olmoe" else 2,
        "head_dim": 16,
        "intermediate": 32,
        "experts": 8,
        "top_k": 2,
        "layers": 2,
        "vocab": 128,
        "token_ids": {},
    }
    return replace(FAMILIES[name], **(small | changes))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# make_checkpoint


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_transformers_loads_every_tensor_of_every_family(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    family = tiny(name)
    write_checkpoint(family, tmp_path / "model", shard_bytes=40_000)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)

    assert {key: list(found) for key, found in report.items() if found} == {}
    assert type(model).__name__ == family.architecture
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        logits = model(torch.arange(12).reshape(1, 12)).logits
    assert logits.shape == (1, 12, 128)
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert model.generation_config.eos_token_id is None


@pytest.mark.parametrize(
    ("name", "layer_bytes"),
    [("qwen3-30b-a3b", 1.2e9), ("mixtral-8x7b", 2.8e9), ("olmoe", 0.8e9), ("gpt-oss-20b", 1.6e9)],
)
def test_families_have_their_true_size(name: str, layer_bytes: float) -> None:
    family = replace(FAMILIES[name], layers=1)
    experts = sum(t.nbytes for t in tensors(family) if ".experts." in t.name)
    assert experts == pytest.approx(layer_bytes, rel=0.02)
    parameters = sum(t.values for t in tensors(FAMILIES[name])) / 1e9
    published = {"qwen3-30b-a3b": 30.5, "mixtral-8x7b": 46.7, "olmoe": 6.92, "gpt-oss-20b": 20.9}
    assert parameters == pytest.approx(published[name], rel=0.01)


def test_weights_are_normal_and_no_two_experts_alike(tmp_path: Path) -> None:
    write_checkpoint(tiny("qwen3-30b-a3b", hidden=256, intermediate=128), tmp_path / "model")
    seen = set()
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name).float()
            if "norm" in name:
                assert (tensor == 1).all()
            elif ".experts." in name:
                assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
                assert abs(tensor.mean().item()) < 0.001
                seen.add(tensor.numpy().tobytes())
            elif "embed" in name:
                assert tensor.std().item() == pytest.approx(1.28, rel=0.05)
    assert len(seen) == 2 * 8 * 3


def test_same_seed_same_bytes_and_another_seed_another_model(tmp_path: Path) -> None:
    family = tiny("olmoe")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(family, tmp_path / name, seed=seed, shard_bytes=30_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_shards_keep_to_their_size_and_the_index_names_them(tmp_path: Path) -> None:
    total = write_checkpoint(tiny("mixtral-8x7b"), tmp_path / "model", shard_bytes=50_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())

    assert len(files) > 2
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == total
    names = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            names += list(file.keys())
        assert path.stat().st_size < 50_000 + 20_000  # and its header
    assert sorted(names) == sorted(index["weight_map"])
    assert "model.layers.1.block_sparse_moe.experts.7.w2.weight" in names


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    family = tiny("qwen3-30b-a3b", hidden=2048, intermediate=768, experts=24, layers=1)
    tracemalloc.start()
    try:
        total = write_checkpoint(family, tmp_path / "model")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total > 200_000_000
    assert peak < 120_000_000


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_checkpoint, "config_json", fail)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tiny("olmoe"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "model.safetensors").write_bytes(b"half")
    write_checkpoint(tiny("olmoe"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DiskSpaceError, match="1000 B free"):
        write_checkpoint(tiny("olmoe"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    code = make_checkpoint.main(["--like", "olmoe", "--layers", "1", "--out", str(tmp_path / "model")])
    assert code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'model'} already exists: remove it or choose another --out"
    ]
    assert list((tmp_path / "model").iterdir()) == []


def test_the_true_vocabulary_brings_its_special_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[Family] = []
    monkeypatch.setattr(make_checkpoint, "write_checkpoint", lambda family, *_, **__: written.append(family) or 0)
    arguments = ["--like", "mixtral-8x7b", "--layers", "3", "--out", str(tmp_path / "m")]
    assert make_checkpoint.main(arguments) == 0
    assert make_checkpoint.main([*arguments, "--vocab", "true", "--experts", "4"]) == 0
    configs = [make_checkpoint.config_json(family) for family in written]
    assert [config["vocab_size"] for config in configs] == [32000, 32000]
    assert [config["eos_token_id"] for config in configs] == [None, 2]
    assert [config["num_local_experts"] for config in configs] == [8, 4]
    assert [config["num_hidden_layers"] for config in configs] == [3, 3]


@pytest.mark.parametrize("wrong", [["--layers", "0"], ["--vocab", "some"], ["--experts", "1"], ["--like", "bert"]])
def test_wrong_arguments_are_refused(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--like", "olmoe", "--layers", "1", "--out", str(tmp_path / "model"), *wrong]
    with pytest.raises(SystemExit) as stopped:
        make_checkpoint.main(arguments)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


# cgroup


@needs_cgroup
def test_a_command_runs_inside_its_cgroup_and_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; block = bytearray(50 << 20); sys.exit(7)"
    with cgroup.MemoryCgroup(200 << 20) as group:
        done = subprocess.run(group.command([sys.executable, "-c", code]))
        usage = group.usage()
        path = group.path
    assert done.returncode == 7
    assert 50 << 20 <= usage.peak_bytes <= 200 << 20
    assert usage.limit_bytes == 200 << 20
    assert usage.oom_kills == 0
    assert not path.exists()


@needs_cgroup
def test_a_command_that_needs_more_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--memory", "60M", "--", sys.executable, "-c", "block = bytearray(500 << 20)"]
    assert cgroup.main(command) == 137
    assert "killed for memory" in capfd.readouterr().err


def hierarchy(tmp_path: Path, mounts: str, proc: str) -> dict[str, Path]:
    (tmp_path / "mounts").write_text(mounts)
    (tmp_path / "cgroup").write_text(proc)
    return {"mounts": tmp_path / "mounts", "proc": tmp_path / "cgroup"}


def test_version_2_uses_the_nearest_ancestor_that_hands_memory_on(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    (root / "user" / "session").mkdir(parents=True)
    (root / "cgroup.subtree_control").write_text("cpu memory pids")
    (root / "user" / "cgroup.subtree_control").write_text("cpu memory")
    (root / "user" / "session" / "cgroup.subtree_control").write_text("")
    files = hierarchy(tmp_path, f"cgroup2 {root} cgroup2 rw 0 0\n", "0::/user/session\n")
    assert cgroup.MemoryCgroup(1 << 30, **files).path.parent == root / "user"


def test_version_1_uses_the_process_own_cgroup(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    (root / "mine").mkdir(parents=True)
    mounts = f"cgroup2 /u cgroup2 rw 0 0\ncgroup {root} cgroup rw,memory 0 0\n"
    files = hierarchy(tmp_path, mounts, "4:memory:/mine\n0::/\n")
    assert cgroup.MemoryCgroup(1 << 30, **files).path.parent == root / "mine"


def test_without_memory_cgroups_the_message_says_so(tmp_path: Path) -> None:
    files = hierarchy(tmp_path, "proc /proc proc rw 0 0\n", "0::/\n")
    with pytest.raises(DeviceError, match="no mounted hierarchy offers the memory controller"):
        cgroup.MemoryCgroup(1 << 30, **files)


# benchmarks


@pytest.fixture
def few_threads() -> Iterator[int]:
    """A thread count for engines, which set torch's; afterwards it is as before."""
    import torch

    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


ECHO = """
import sys
sys.path[:0] = {path!r}
from scripts.bench.common import serve

def load():
    print("noise")
    return lambda request: {{"double": 2 * request["value"], "grown": len(bytearray(request["grow"]))}}

sys.exit(serve(load))
"""


def echo_command() -> list[str]:
    return [sys.executable, "-c", ECHO.format(path=[str(SCRIPTS.parent), *sys.path])]


@linux
def test_a_worker_answers_in_turn_and_its_peak_is_measured() -> None:
    with common.Worker("echo", echo_command()) as worker:
        assert worker.ask(value=4, grow=0)["double"] == 8
        assert worker.ask(value=5, grow=64 << 20)["grown"] == 64 << 20
    assert worker.peak_rss_bytes > 64 << 20


@linux
def test_a_worker_that_fails_is_an_error_not_a_hang(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(OffloadError, match="echo ended early: its own message is above"),
        common.Worker("echo", echo_command()) as worker,
    ):
        worker.ask(value=None, grow=0)
    assert "TypeError" in capfd.readouterr().err


@needs_cgroup
def test_a_worker_killed_for_memory_is_named_so() -> None:
    with (
        pytest.raises(OffloadError, match="echo ended early: killed for memory"),
        common.Worker("echo", echo_command(), memory_bytes=60 << 20) as worker,
    ):
        worker.ask(value=1, grow=200 << 20)


@linux
def test_disk_bandwidth_reads_whole_records(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(os.urandom(1 << 20))
    (tmp_path / "small.safetensors").write_bytes(b"x")
    speed = common.disk_bandwidth(common.shards(tmp_path), 100_000, seed=0, total_bytes=1 << 20)
    assert speed > 0
    with pytest.raises(OffloadError, match="no shard is larger than one record"):
        common.disk_bandwidth([tmp_path / "small.safetensors"], 100_000, seed=0)
    with pytest.raises(OffloadError, match="holds no"):
        common.shards(tmp_path / "nowhere")


def test_random_ids_are_fixed_by_their_seed() -> None:
    ids = common.random_ids(200, 100, seed=3)
    assert ids == common.random_ids(200, 100, seed=3)
    assert ids != common.random_ids(200, 100, seed=4)
    assert 50 < len(set(ids)) <= 100
    assert all(0 <= token < 100 for token in ids)


def test_the_result_is_the_last_line_and_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> dict[str, object]:
        raise common.BenchmarkError("no disk")

    assert common.run(lambda: {"ratio": 2.0}) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] == 2.0
    assert common.run(fail) == 2
    assert capsys.readouterr().err == "error: no disk\n"


def test_engines_choose_the_same_tokens(tmp_path: Path, few_threads: int) -> None:
    from scripts.bench import engines as _engines

    write_checkpoint(tiny("qwen3-30b-a3b", experts=16), tmp_path / "model", shard_bytes=100_000)
    engines = {
        "offload": _engines.load_offload(tmp_path / "model", few_threads, None, 64),
        "transformers": _engines.load_transformers(tmp_path / "model", few_threads),
        "accelerate": _engines.load_accelerate(tmp_path / "model", few_threads, tmp_path / "rewritten"),
        "half": _engines.load_accelerate(tmp_path / "model", few_threads, tmp_path / "half", cpu_layers=1),
        "dense": _engines.load_dense_part(tmp_path / "model", few_threads),
    }
    ids = common.random_ids(24, 128, seed=0)
    answers = {name: _engines.handler(engine)({"ids": ids}) for name, engine in engines.items()}

    assert all(len(answer["seconds"]) == 24 for answer in answers.values())
    assert len(set(answers["transformers"]["chosen"])) > 5
    for name in ("offload", "accelerate", "half"):
        assert answers[name]["chosen"] == answers["transformers"]["chosen"], name
    stats = answers["offload"]["stats"]
    assert stats["hits"] + stats["misses"] + stats["late_hits"] + stats["bypasses"] == 24 * 2 * 2
    assert len(list((tmp_path / "rewritten").iterdir())) == 2 * len(list((tmp_path / "half").iterdir())) == 4
    assert _engines.handler(engines["offload"])({"ids": ids, "prefill": True})["seconds"][0] > 0
    assert len(_engines.handler(engines["transformers"])({"ids": ids, "at_most_s": 0})["chosen"]) == 1
    engines["offload"].close()


def test_an_engine_that_cannot_says_why_ever_after(capfd: pytest.CaptureFixture[str]) -> None:
    def load() -> serve.Handler:
        raise ImportError("no such engine\nas this one")

    def fail(request: serve.Request) -> serve.Answer:
        raise ValueError(request["value"])

    assert serve.explaining(load)({}) == {"unable": "ImportError: no such engine"}
    handle = serve.explaining(lambda: fail)
    assert [handle({"value": text}) for text in "ab"] == [{"unable": "ValueError: a"}] * 2
    assert serve.explaining(lambda: dict)({"value": 3}) == {"value": 3}
    assert "Traceback" in capfd.readouterr().err


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


@pytest.mark.full
@needs_cgroup
def test_the_peer_benchmark_without_peers(tmp_path: Path) -> None:
    from cache.traces.trace import Trace

    rng = random.Random(0)
    experts = [[rng.sample(range(8), 2) for _ in range(3)] for _ in range(100)]
    trace = Trace.from_arrays(experts, [[[0.6, 0.4]] * 3] * 100, [0, 60, 100], num_experts=8)
    trace.write(tmp_path / "trace.safetensors")
    options = ("--tokens", 6, "--warm-up", 4, "--repetitions", 2, "--prompt", 12, "--layers", 2)
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
    assert [case["trace"] for case in result["cases"]] == [None, "trace.safetensors"] * 2
    assert not list((tmp_path / "work").iterdir())
    assert "routed by trace.safetensors" in (tmp_path / "peers.md").read_text()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_prefetch_benchmark(tmp_path: Path, device: str) -> None:
    checkpoint = tmp_path / "model"
    write_checkpoint(tiny("qwen3-30b-a3b", experts=16), checkpoint, shard_bytes=100_000, embedding_std=4)
    sizes = "--repetitions", 1, "--tokens", 4, "--warm-up", 3, "--expert-cache", "100KB"
    trace = tmp_path / "trace.safetensors"
    result = run_benchmark("bench/prefetch", checkpoint, "--device", device, "--keep-trace", trace, *sizes)
    assert result["gate_recall"]["1"]["2K"] >= result["gate_recall"]["1"]["K"] > 0
    rows = {(row["predictor"], row["depth"]): row for row in result["rows"]}
    assert {"none", "frequency", "cross-layer-gate", "oracle"} == {predictor for predictor, _ in rows}
    assert rows["none", 0]["speedup"] == 1 and rows["none", 0]["prefetches_per_token"] == 0
    assert all(row["s_per_token"] > 0 for row in rows.values())
    assert ("saturated" in result) == (device == "emulated")

    (tmp_path / "result.json").write_text(json.dumps(result))
    machine().write(tmp_path / "machine.json")
    script = SCRIPTS / "bench" / "replay_prefetch.py"
    options = "--machine", tmp_path / "machine.json", "--slots", 8, "--warm-up", 3
    command = [sys.executable, script, tmp_path / "result.json", trace, *options]
    said = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, text=True).stdout
    assert said.count("predicted") == len(result["rows"]) + len(result.get("saturated", ()))


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
    often = "--repetitions", 1, "--starts", 1, "--experts", "8,16"
    result = run_benchmark("bench/scaling", "--folder", tmp_path, *sizes, *often)
    for plan, hit_rate in (("eight", 1), ("all", 1), ("missing", 0.5)):
        assert [(row["experts"], row["hit_rate"]) for row in result["decode"][plan]] == [(8, hit_rate), (16, hit_rate)]
        assert result["decode"][plan][0]["ratio"] == 1
    small, large = result["start"]["16"], result["start"]["16 large"]
    assert large["checkpoint_bytes"] > 2 * small["checkpoint_bytes"]
    assert large["read_bytes"] - small["read_bytes"] < 10_000  # headers, and no weights of experts
    assert not list(tmp_path.iterdir())


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


def run_benchmark(name: str, *arguments: object) -> dict[str, Any]:
    """The JSON line that the benchmark prints last."""
    script = SCRIPTS / f"{name}.py"
    done = subprocess.run([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == ("peers" if name == "peers/bench" else name.removeprefix("bench/"))
    assert result["machine"]["cores"] >= 1
    return result


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
def test_the_resident_benchmark(checkpoint: Path) -> None:
    options = ("--tokens", 6, "--prompt", 32, "--repetitions", 3)
    result = run_benchmark("bench/resident", checkpoint, *options)
    assert result["same_choice"] == 1
    assert result["ratio"] > 0
    assert result["offload_s_per_token"] > 0


def test_the_benchmark_of_a_step(checkpoint: Path) -> None:
    here = SCRIPTS.parent
    options = ("--engines", "ours-bf16", "--against", here, "--tokens", 3, "--repetitions", 2, "--threads", 1)
    result = run_benchmark("bench/step", checkpoint, *options)
    assert result["ours-bf16"].keys() == result["ours-bf16, before"].keys()
    assert 0 < result["ours-bf16"]["share_of_memory"] < 2 and result["ratios"]["ours-bf16"] > 0


@linux
@pytest.mark.full
def test_the_replay_benchmark(tmp_path: Path) -> None:
    from cache.traces.trace import Trace

    rng = random.Random(0)
    experts = [[rng.sample(range(8), 2) for _ in range(3)] for _ in range(100)]
    trace = Trace.from_arrays(experts, [[[0.6, 0.4]] * 3] * 100, [0, 60, 100], num_experts=8)
    trace.write(tmp_path / "trace.safetensors")
    result = run_benchmark("bench/replay", tmp_path / "trace.safetensors", "--repetitions", 2, "--policies", "lru,mrs")
    assert result["accesses"] == 600
    assert result["slots"] == 2
    assert result["ten"] == [1, 2, 3, 4, 5, 6, 7]
    for row in result["policies"].values():
        assert row["accesses_per_s"] > 0
        assert row["accesses_per_s_at_ten"] > 0


# documentation


def test_dead_references_in_the_documentation_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "there.md").write_text("[up](../README.md) [web](https://example.org) [own](#part)\n")
    (tmp_path / "README.md").write_text("[docs](docs/there.md) `docs/there.md`\n```\n[not](a/link)\n```\n")
    assert check_docs.main(tmp_path) == 0
    (tmp_path / "README.md").write_text("[docs](docs/gone.md) and `scripts/gone.py`\n")
    assert check_docs.main(tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "README.md: no such file: docs/gone.md",
        "README.md: no such file: scripts/gone.py",
    ]


def test_the_project_s_own_documentation_has_no_dead_reference() -> None:
    assert check_docs.main() == 0
