"""`offload bench` and `offload plan` say what was predicted beside what was measured. No speed has a limit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import machine
from tiny import ids, one_thread, open_model, save

from cache.errors import ContextError, TraceError
from cache.traces.trace import Trace
from offload.options import LoadOptions
from offload.system import quiet
from offload.system.paths import machine_profile_path, own_place
from offload.terminal import main as cli
from offload.terminal.tables import speeds_table
from offload.tuning.bench import BenchResult, bench

FIGURES = (
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "time_to_first_token_s",
    "hit_rate",
    "host_hit_rate",
    "peak_rss_bytes",
    "peak_gpu_bytes",
)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    yield from one_thread()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), "qwen3_moe", torch.bfloat16)


@pytest.fixture(scope="module")
def trace_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model's own routers do with a few sequences."""
    file = tmp_path_factory.mktemp("trace") / "routing.safetensors"
    with open_model(folder) as model, model.record_trace(file):
        for seed in range(4):
            model(ids(1, 24, seed))
    return file


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine profile where `offload profile` stores it."""
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    machine().write(own_place(machine_profile_path()))
    return machine_profile_path()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return int(exited.value.code or 0), shown.out, shown.err

    return run


def options(**changes: Any) -> LoadOptions:
    return LoadOptions(**({"cpu_mem": "8G", "device": "cpu", "context": 64, "threads": 1} | changes))


def slot_bytes(folder: Path) -> int:
    with open_model(folder) as model:
        return model.plan.slot_bytes


def measured(folder: Path, trace: Trace | None = None, **changes: Any) -> BenchResult:
    return bench(folder, options(**changes), tokens=6, prompt_tokens=8, repeat=2, trace=trace, profile=machine())


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_the_predicted_hit_rates_are_the_measured_ones(folder: Path, trace_file: Path, device: str) -> None:
    """Under one trace the replay makes the run's own decisions, over both tiers: nothing can differ that time does not
    decide, as it does what is fetched ahead."""
    changes: dict[str, Any] = {"expert_cache": 6 * slot_bytes(folder), "device": device, "prefill": "kept"}
    if device == "emulated":
        changes |= {"gpu_mem": "1G", "link": "2GB/s"}
    result = bench(
        folder, options(**changes), tokens=6, prompt_tokens=8, repeat=1, trace=Trace.open(trace_file), profile=machine()
    )
    assert result.unpredicted is None
    assert 0 < (result.actual.hit_rate or 0) < 1
    assert result.predicted.hit_rate == pytest.approx(result.actual.hit_rate)
    assert result.predicted.host_hit_rate == result.actual.host_hit_rate == (None if device == "cpu" else 1.0)
    assert result.predicted.peak_gpu_bytes == result.actual.peak_gpu_bytes


def test_all_figures_are_there_with_and_without_a_prediction(folder: Path) -> None:
    values = measured(folder).as_dict()
    for name in FIGURES:
        on_gpu_only = name in ("host_hit_rate", "peak_gpu_bytes")
        assert (values[name] is None) == on_gpu_only
        assert (values[f"predicted_{name}"] is None) == on_gpu_only
    json.dumps(values)
    without = bench(folder, options(), tokens=2, prompt_tokens=2, repeat=1)
    assert without.predicted.decode_tokens_per_s is None
    assert without.predicted.peak_rss_bytes == values["predicted_peak_rss_bytes"] or without.predicted.peak_rss_bytes
    assert "offload profile" in (without.unpredicted or "")
    assert without.actual.decode_tokens_per_s


def test_the_table_says_how_far_off_it_was() -> None:
    from rich.console import Console

    from offload.simulation.forecast import Speeds

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(speeds_table(Speeds(decode_tokens_per_s=11.0, hit_rate=0.5), Speeds(decode_tokens_per_s=10.0)))
    shown = console.export_text()
    assert [line.split() for line in shown.splitlines() if "decode" in line] == [
        ["decode,", "tokens/s", "11.0", "10.0", "+10%"],
        ["hit", "rate,", "decode", "50.0%", "-"],
    ]


def test_what_does_not_fit_is_refused(folder: Path, trace_file: Path) -> None:
    with pytest.raises(ContextError, match="a prompt of 60 tokens and 10 more do not fit a context of 64"):
        bench(folder, options(), tokens=10, prompt_tokens=60)
    trace = Trace.open(trace_file)
    other = Trace.from_arrays(
        trace.experts[..., :1], trace.weights[..., :1], trace.sequence_offsets, num_experts=trace.num_experts
    )
    with pytest.raises(TraceError, match="record one with this model's shape"):
        measured(folder, other)


def test_the_command_prints_predicted_beside_actual(
    folder: Path, trace_file: Path, stored: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ("bench", folder, "--device", "cpu", "--context", 64, "--tokens", 4, "--prompt-tokens", 8)
    code, out, err = run(*arguments, "--repeat", 1)
    assert (code, "no prediction" in err) == (0, False)
    assert "predicted" in out
    assert "decode, tokens/s" in out
    code, out, _ = run(*arguments, "--repeat", 1, "--trace", trace_file, "--machine", stored, "--json")
    values = json.loads(out)
    assert code == 0
    assert {f"predicted_{name}" for name in FIGURES} | set(FIGURES) <= set(values)
    assert values["trace"] == str(trace_file)


def test_a_plan_predicts_and_measures_nothing(
    folder: Path, trace_file: Path, stored: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ("plan", folder, "--device", "cpu", "--context", 64)
    _, out, _ = run(*arguments, "--json", "--trace", trace_file)
    values = json.loads(out)
    assert all(values[name] is None for name in FIGURES)
    assert values["predicted_decode_tokens_per_s"] > 0
    assert values["predicted_time_to_first_token_s"] > 0
    assert "decode, tokens/s" in run(*arguments)[1]
    stored.unlink()
    code, out, err = run(*arguments)
    assert code == 0
    assert "no prediction of speeds: this machine has not been measured" in err
    assert "peak RAM" in out


def test_a_plan_follows_a_trace_by_the_parts_of_its_preset(
    folder: Path, trace_file: Path, stored: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """And says what makes no difference."""
    cache = str(6 * slot_bytes(folder))
    arguments = ("plan", folder, "--device", "cpu", "--context", 64, "--expert-cache", cache)
    speeds = {}
    for preset in ("default", "expertflow", "moe-infinity"):
        code, out, err = run(*arguments, "--json", "--preset", preset, "--trace", trace_file)
        speeds[preset] = json.loads(out)["predicted_hit_rate"]
        assert (code, "--preset" in err) == (0, False)
    assert len(set(speeds.values())) > 1
    assert "--preset fate: speeds are of a typical locality" in run(*arguments, "--preset", "fate")[2]
    assert (
        "--policy learn from a profile, so speeds are of the default"
        in run(*arguments, "--preset", "fiddler", "--trace", trace_file)[2]
    )
    assert "--preset" not in run(*arguments)[2]


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_a_machines_profile_is_still_taken_by_its_old_flag(
    folder: Path, stored: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]], command: str
) -> None:
    moved = stored.rename(tmp_path / "machine.json")
    short = ("--repeat", 1, "--tokens", 2) if command == "bench" else ()
    code, out, err = run(command, folder, "--device", "cpu", "--context", 80, *short, "--profile", moved, "--json")
    assert code == 0 and json.loads(out)["predicted_decode_tokens_per_s"] > 0
    assert "--machine" in err


def test_a_stored_profile_of_an_older_program_is_said_so_and_one_asked_for_is_refused(
    folder: Path, stored: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    values = machine().as_dict() | {"version": 2}
    stored.write_text(json.dumps(values))
    code, _, err = run("plan", folder, "--device", "cpu", "--context", 64)
    assert code == 0
    assert "of version 2, this program reads version 3: measure again with: offload profile" in err
    code, _, err = run("plan", folder, "--device", "cpu", "--context", 64, "--machine", stored)
    assert code == 2
    assert "of version 2" in err


def test_a_profile_of_a_busy_machine_is_warned_of(
    folder: Path, trace_file: Path, stored: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    said = "offload: warning: this machine's profile was measured while it was busy (others worked): predictions may be"
    replay = ("replay", trace_file, "--policy", "lru", "--capacity", "50%", "--expert-bytes", "1M")
    short = ("--device", "cpu", "--tokens", "2", "--prompt-tokens", "2", "--repeat", "1")
    commands = (("plan", folder, "--device", "cpu"), ("bench", folder, *short), replay)
    for command in commands:
        assert said not in run(*command)[2]
    replace(machine(), busy="others worked").write(stored)
    for command in commands:
        code, _, err = run(*command)
        assert code == 0 and err.count(said) == 1, command


def test_a_plan_for_a_stock_machine_says_that_it_was_estimated(
    folder: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    asked = ("plan", folder, "--context", 64, "--cpu-mem", "8G", "--machine")  # this process has much of it already
    code, out, _ = run(*asked, "mini-pc-ddr4", "--device", "cpu")
    assert code == 0 and out.count("estimated: mini-pc-ddr4: from specifications, not measured") == 1
    gpu = ("--device", "emulated", "--gpu-mem", "100M", "--json")
    code, out, err = run(*asked, "rtx-4060-laptop", *gpu)
    assert code == 0 and json.loads(out)["predicted_decode_tokens_per_s"] > 0
    assert "rtx-4060-laptop: from specifications, not measured" in err
    code, out, err = run(*asked, "mini-pc-ddr4", *gpu)
    assert json.loads(out)["predicted_decode_tokens_per_s"] is None and "has no accelerator" in err
    code, _, err = run(*asked, "rtx-1")
    assert code == 2 and 'no machine is called "rtx-1": choose one of a6000-workstation' in err


def test_a_batch_has_moe_lens_bound_beside_it_where_all_is_in_memory(
    folder: Path, stored: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    def bench_of(*more: object, batch: int = 8) -> tuple[str, str]:
        code, out, err = run("bench", folder, "--cpu-mem", "8G", "--device", "cpu", "--context", 96, "--threads", 1,
                             "--tokens", 4, "--prompt-tokens", 8, "--repeat", 1, "--batch", batch, *more)  # fmt: skip
        assert code == 0, err
        return out, err

    out, err = bench_of()
    assert "MoE-Lens' bound (arXiv 2504.09345): " in out and "p = 8, g = 4, 96 tokens of KV cache" in out
    assert "no prediction of speeds: it is for one sequence at a time" in err
    said = json.loads(bench_of("--json")[0])
    bound = said["moe_lens"]
    with open_model(folder) as model:
        experts = model.plan.experts * model.plan.slot_bytes
    assert (said["batch"], bound["kv_tokens"], bound["bytes_per_s"]) == (8, 96, 10e9)
    assert experts < bound["model_bytes"] < 100 * experts
    assert bound["share"] == pytest.approx(bound["measured_tokens_per_s"] / bound["tokens_per_s"])
    assert bound["measured_tokens_per_s"] > said["decode_tokens_per_s"] / 2
    # Neither where a pass needs few experts, nor where they come from disk, nor of one sequence.
    for more in ({"batch": 1}, {"batch": 2}):
        assert json.loads(bench_of("--json", **more)[0])["moe_lens"] is None
    assert json.loads(bench_of("--json", "--expert-cache", "20K")[0])["moe_lens"] is None


def test_a_batch_fits_the_context_as_a_whole(folder: Path) -> None:
    with pytest.raises(ContextError, match="8 tokens and 6 more in each of 5 sequences do not fit a context of 64"):
        bench(folder, options(), tokens=6, prompt_tokens=8, batch=5)


def test_an_accelerator_has_no_such_bound(folder: Path) -> None:
    from offload.plan.prepare import make_plan
    from offload.tuning.bench import bound_of

    plan = make_plan(folder, options())
    bound = bound_of(plan, machine(), 8, 4, 1.0, 1)
    assert bound is not None and bound.tokens_per_s <= bound.compute_tokens_per_s
    assert bound_of(plan, machine(), 8, 4, 0.89, 1) is None
    assert bound_of(plan, None, 8, 4, 1.0, 1) is None
    on_accelerator = replace(plan, gpu_mem_bytes=2**30)
    assert bound_of(on_accelerator, machine(), 8, 4, 1.0, 1) is None
