"""`offload tune` and `offload bench --preset`: what is tried, measured, stored, and used."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_chat
from command_line import run

from cache.errors import OffloadError, TraceError
from cache.traces.trace import Trace
from cache.types import Tier
from offload.decide.preset import DEFAULT, Preset
from offload.decide.presets import PRESETS
from offload.options import LoadOptions
from offload.plan.tuned import Place, Tuned
from offload.simulation.forecast import Speeds
from offload.simulation.preset_rows import PresetRow
from offload.system.paths import machine_profile_path, own_place
from offload.tuning import trials as preset_bench
from offload.tuning import tune as tuning
from offload.tuning.trials import Length, Trial, bench_presets, rank_correlation
from offload.tuning.tune import distinct, systems
from tests.cache.machines import machine

quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)
BUDGETS = ["--device", "emulated", "--link", "500MB/s", "--gpu-mem", "1G", "--cpu-mem", "4G", "--expert-cache", "20K"]
SHORT = ["--context", "128", "--threads", "1", "--tokens", "6", "--prompt-tokens", "5", "--repeat", "1"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    replace(machine(), link_stated_bytes_per_s=500e6).write(own_place(machine_profile_path()))
    yield tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save_checkpoint(tmp_path_factory.mktemp("tune") / "model")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkpoint's shape: 2 layers, top-2 of 4."""
    file = tmp_path_factory.mktemp("traces") / "made.safetensors"
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((200, 2, 4)), axis=-1)[..., :2]
    weights = np.tile(np.array([0.6, 0.4], np.float32), (200, 2, 1))
    Trace.from_arrays(experts, weights, np.arange(0, 201, 40), num_experts=4).write(file)
    return file


def options_of(**more: Any) -> LoadOptions:
    budgets = {"device": "emulated", "link": "500MB/s", "gpu_mem": "1G", "cpu_mem": "4G", "expert_cache": "20K"}
    return LoadOptions(**{**budgets, "context": 128, "threads": 1, **more})


def test_tune_stores_what_auto_then_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "tune", folder, *BUDGETS, *SHORT, "--json")
    said = json.loads(out)
    tried = said["rows"]
    measured = [row for row in tried if row["actual"] is not None]
    assert 3 <= len(measured) <= 4 and measured == tried[: len(measured)]
    assert "default" in [row["preset"] for row in measured]
    assert all(row["lossless"] and row["predicted"]["tokens_per_s"] > 0 for row in tried)
    assert {"fate", "hybrimoe", "expertflow"} <= {row["preset"] for row in tried}
    assert said["winner"] == {name: measured[0][name] for name in said["winner"]}
    speeds = [row["actual"]["decode_tokens_per_s"] for row in measured]
    assert speeds == sorted(speeds, reverse=True)
    assert "is stored: --preset auto" in err

    place = Place.of(folder, options_of())
    stored = Tuned.read(place)
    assert stored is not None and stored.winner.parts == said["winner"] and str(place.path) == said["stored"]
    Tuned(place, replace(stored.winner, policy="lfu", pool="layer")).write()
    with tiny.open_model(
        folder, preset="auto", device="emulated", gpu_mem="1G", cpu_mem="4G", expert_cache="20K", context=128
    ) as model:
        policy = model.parts.runtime.manager.computing.policy
        assert policy.name == "lfu" and policy.lanes.count == 2
    out, err = run(capsys, "generate", folder, "--preset", "auto", *BUDGETS, "--context", 128, "--prompt-ids", "1,2",
                   "--max-new-tokens", 3, "--json")  # fmt: skip
    assert json.loads(out) and "warning" not in err


def test_tune_follows_a_trace_and_prints_a_table(
    folder: Path, trace: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, "tune", folder, *BUDGETS, *SHORT, "--trace", trace, "--policy", "lru")
    for word in ("tokens/s", "predicted", "default", "lossless", "peak GPU"):
        assert word in out
    assert "policy" not in out  # named by a flag, it is the same in all
    assert not list((cache_folder / "tuned").glob("*.safetensors"))


def test_a_machine_that_was_not_measured_is_measured_first(
    folder: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from offload.machine import measure as profile

    machine_profile_path().unlink()
    asked: list[str] = []

    def measure(folder: Path, device: Any, threads: int | None, on_step: Any) -> Any:
        asked.append(device.name)
        on_step("disk")
        return replace(machine(), link_stated_bytes_per_s=500e6)

    monkeypatch.setattr(profile, "measure_machine", measure)
    for _ in range(2):
        _, err = run(capsys, "tune", folder, *BUDGETS, *SHORT, "--trace", trace, "--policy", "lru")
    assert asked == ["emulated"] and "this machine was measured" not in err


def test_a_stopped_tune_stores_nothing(
    folder: Path, trace: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "measured", lambda *_: signal.raise_signal(signal.SIGINT))
    _, err = run(capsys, "tune", folder, *BUDGETS, *SHORT, "--trace", trace, code=130)
    assert "stopped: nothing was stored" in err and not list((cache_folder / "tuned").iterdir())


def test_what_is_tried() -> None:
    assert [preset.name for preset in systems(lossy=False)] == [
        *("default", "fate", "hybrimoe", "moe-infinity", "mixtral-offloading", "expertflow", "freetoken"),
        *("expert-buffering", "monde", "se-moe", "dali"),
    ]
    assert {preset.name for preset in systems(lossy=True)} > {"hobbit", "adapmoe", "d2moe"}
    assert "edgemoe" not in {preset.name for preset in systems(lossy=True)}


def test_each_composition_is_tried_once(folder: Path) -> None:
    options = options_of(device="cpu", gpu_mem=None, link=None, predictor="none")
    plan = preset_bench.reference_plan(folder, options)
    found = distinct([PRESETS["fate"], PRESETS["freetoken"], replace(DEFAULT, policy="lru")], plan, options)
    assert [(preset.name, preset.scheduler) for preset in found] == [("fate", "gpu-only"), ("freetoken", "gpu-only")]


def test_tune_chooses_the_preset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "tune", folder, "--preset", "fate", code=2)
    assert "tune chooses among all of them" in err


def test_tune_leaves_out_what_the_model_refuses(
    folder: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as gates that cannot be asked ahead, which only loading the model shows."""
    refused: list[str] = []

    def measured(model: Any, options: Any, preset: Preset, *_: Any) -> Speeds:
        if len(refused) < 2:
            refused.append(preset.name)
            raise TraceError("cannot be asked")
        return Speeds(decode_tokens_per_s=1.0)

    monkeypatch.setattr(tuning, "measured", measured)
    out, err = run(capsys, "tune", folder, *BUDGETS, *SHORT, "--trace", trace, "--json")
    found = [row["preset"] for row in json.loads(out)["rows"] if row["actual"] is not None]
    assert 3 <= len(found) <= 4 and not set(found) & set(refused)
    assert all(f"{name} is left out: cannot be asked" in err for name in refused)

    monkeypatch.setattr(tuning, "measured", lambda *_: _refuse())
    _, err = run(capsys, "tune", folder, *BUDGETS, *SHORT, "--trace", trace, code=2)
    assert "error: cannot be asked" in err


def _refuse() -> Speeds:
    raise TraceError("cannot be asked")


def test_a_depth_is_for_those_with_a_predictor(folder: Path, trace: Path) -> None:
    options = options_of(prefetch_depth=1)
    plan = preset_bench.reference_plan(folder, options)
    found = distinct([DEFAULT, PRESETS["expertflow"], PRESETS["freetoken"]], plan, options)
    assert [(preset.name, preset.prefetch_depth) for preset in found] == [
        *(("default", 1), ("expertflow", 1), ("freetoken", None))
    ]


def test_a_scheduler_with_nothing_to_divide_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--cpu-mem", "4G", *SHORT, "--scheduler", "dali"]
    for command in (["tune"], ["bench", "--preset", "default,fate"]):
        _, err = run(capsys, command[0], folder, *command[1:], *given, code=2)
        assert "--scheduler dali divides layers between an accelerator and the CPU" in err
        assert "choose another --device, such as emulated" in err


def test_memory_without_room_for_an_expert_is_replayed(folder: Path, trace: Path) -> None:
    """Host memory behind an accelerator may have none; and prompts are read as the flags say."""
    options = options_of()
    plan = preset_bench.reference_plan(folder, options)
    plan = replace(plan, cache_bytes={Tier.GPU: plan.cache_bytes[Tier.GPU], Tier.CPU: 0})
    seen = tuning.followed(plan, Trace.open(trace), Length(6, 40, 1))
    measured = replace(machine(), link_stated_bytes_per_s=500e6)
    streamed, plain = (
        preset_bench.replayed_as_planned(seen, DEFAULT, plan, measured, options_of(prefill=way))
        for way in ("streamed", "on-demand")
    )
    assert streamed.host_capacity == "0%" and streamed.late_hit_rate + streamed.hit_rate > plain.hit_rate


# Bench.


def test_what_learns_asks_for_a_profile(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "bench", folder, *BUDGETS, "--preset", "finemoe,fate", code=2)
    assert "preset finemoe learns from a recorded trace: name one with --profile" in err
    _, err = run(capsys, "bench", folder, *BUDGETS, "--preset", "auto,fate", code=2)
    assert "`offload tune` stored" in err
    _, err = run(capsys, "bench", folder, *BUDGETS, "--policy", "static", code=2)
    assert "--policy static learns from a recorded trace" in err


def test_presets_are_measured_side_by_side(folder: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--preset", "default,fate,hobbit"]
    out, _ = run(capsys, "bench", folder, *BUDGETS, *SHORT, *names, "--trace", trace, "--json")
    said = json.loads(out)
    assert {row["preset"] for row in said["rows"]} == {"default", "fate", "hobbit"}
    for row in said["rows"]:
        assert row["actual"]["decode_tokens_per_s"] > 0 and row["actual"]["peak_gpu_bytes"] > 0
        assert row["predicted"]["tokens_per_s"] > 0
    assert -1 <= said["rank_correlation"] <= 1
    out, _ = run(capsys, "bench", folder, *BUDGETS, *SHORT, *names, "--trace", trace)
    assert "Spearman's rank correlation" in out


def test_what_several_presets_do_not_use_is_said(
    folder: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preset_bench, "measured", _measured)
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    machine().write(tmp_path / "m.json")
    command = ["bench", folder, *BUDGETS, *SHORT, "--preset", "default,freetoken"]
    _, err = run(capsys, *command, "--machine", tmp_path / "m.json")
    assert "--machine does nothing for several presets without a --trace" in err
    _, err = run(capsys, *command, "--trace", trace)
    assert "no prediction of speeds: this machine has not been measured" in err
    assert run(capsys, *command)[1] == ""


def test_all_leaves_out_what_cannot_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preset_bench, "measured", _measured)
    said: list[str] = []
    arguments: dict[str, Any] = {"trace": None, "machine": None, "say": lambda text: None, "notice": said.append}
    trials = bench_presets(folder, options_of(), ["all"], Length(), **arguments)
    assert trials[0].preset.name == "freetoken"
    assert {trial.preset.name for trial in trials} == {"default", *PRESETS} - {"edgemoe", "finemoe", "fiddler"}
    assert len(said) == 3 and any("edgemoe is left out: no calibration" in line for line in said)
    with pytest.raises(OffloadError, match="no calibration"):
        bench_presets(folder, options_of(), ["edgemoe"], Length(), **arguments)


def _measured(model: Any, options: Any, preset: Preset, *_: Any) -> Speeds:
    if preset.needs_calibration:
        raise OffloadError("no calibration")
    return Speeds(decode_tokens_per_s=2.0 if preset.name == "freetoken" else 1.0, hit_rate=0.5, peak_rss_bytes=1)


def trial(predicted: float, actual: float) -> Trial:
    row = PresetRow(
        *("t", "p", "lru", "global", None, "none", "ours", None, "auto", "none", "gpu-only", "empty"),
        *("cpu", True, None, "25%", 1, 0.25, ""),
        *(1, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, predicted, 1.0, {}, 0.0, 0.0, 0.0),
    )
    return Trial(DEFAULT, row, Speeds(decode_tokens_per_s=actual))


def test_ranks_are_compared() -> None:
    assert rank_correlation([trial(1, 10), trial(2, 20), trial(3, 25)]) == pytest.approx(1)
    assert rank_correlation([trial(1, 30), trial(2, 20), trial(3, 1)]) == pytest.approx(-1)
    assert rank_correlation([trial(1, 1), trial(1, 2), trial(2, 3)]) == pytest.approx(3**0.5 / 2)
    assert rank_correlation([trial(1, 1), trial(1, 2), trial(1, 3)]) is None
    assert rank_correlation([trial(1, 1), trial(2, 2)]) is None
