"""Flags of `offload replay`: the system that they compose, and those that would do nothing, which are told so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from made_trace import make_trace
from own_cache import own_cache

from cache.traces.trace import Trace
from offload.decide.preset import DEFAULT
from predictors.training import fit

_cache_folder = pytest.fixture(scope="module", autouse=True)(own_cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces of one model: `made` has three sequences and what gates said, `plain` does not; `one` has one sequence."""
    made = make_trace()
    found = tmp_path_factory.mktemp("traces")
    made.write(found / "made.safetensors")
    replace(made, predicted=None).write(found / "plain.safetensors")
    make_trace(seed=1, sequences=1).write(found / "one.safetensors")
    foreign = Trace.from_arrays(np.zeros((4, 2, 1)), np.ones((4, 2, 1)), [0, 4], num_experts=4)
    foreign.write(found / "foreign.safetensors")
    return found


def run(capsys: pytest.CaptureFixture[str], folder: Path, machine: Path, text: str, code: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of `offload replay` with the words of `text`, in which `%` is the folder."""
    words = [word.replace("%/", f"{folder}/") for word in text.split()]
    return command_line.run(capsys, "replay", *words, "--machine", machine, code=code)


def rows(capsys: pytest.CaptureFixture[str], folder: Path, machine: Path, text: str) -> list[dict[str, Any]]:
    """What it prints as JSON."""
    found: list[dict[str, Any]] = json.loads(run(capsys, folder, machine, f"{text} --json")[0])
    return found


def test_flags_of_parts_compose_the_one_system_that_is_replayed(
    folder: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"experts": "auto,nf4", "fallback": "hobbit", "scheduler": "dali", "placement": "random(seed=3)"}
    text = " ".join(f"--{name} {value}" for name, value in said.items())
    (row,) = rows(capsys, folder, profile_file, f"%/made.safetensors --device gpu --policy lfu {text}")
    assert {name: row[name] for name in DEFAULT.parts} == DEFAULT.parts | said | {"policy": "lfu"}
    assert set(row["precision_shares"]) == {"bf16", "nf4"} and 0 < row["lossless_share"] < 1
    (alone,) = rows(capsys, folder, profile_file, "%/made.safetensors --experts nf4")
    assert (alone["preset"], alone["experts"], alone["precision_shares"]) == ("default", "nf4", {"nf4": 1.0})


def test_flags_of_parts_win_over_every_preset(
    folder: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "%/made.safetensors --preset fate,hobbit,freetoken --device gpu"
    found = rows(capsys, folder, profile_file, f"{text} --experts int4>int2 --fallback deadline --scheduler auto")
    parts = {(row["experts"], row["fallback"], row["scheduler"]) for row in found}
    assert parts == {("int4>int2", "deadline", "auto")} and len(found) == 3
    found = rows(capsys, folder, profile_file, f"{text} --experts nf4")
    assert {(row["experts"], row["fallback"]) for row in found} == {("nf4", "none")}
    found = rows(capsys, folder, profile_file, f"{text} --placement random --fallback none")
    assert {(row["experts"], row["fallback"], row["placement"]) for row in found} == {("auto", "none", "random")}


def test_presets_may_know_the_future_of_the_trace_that_is_replayed(
    folder: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not that of the profile."""
    text = "%/made.safetensors --preset freetoken --capacity 50% --warm"
    (lru,) = rows(capsys, folder, profile_file, text)
    (belady,) = rows(capsys, folder, profile_file, f"{text} --policy belady")
    assert belady["hit_rate"] > lru["hit_rate"]
    (oracle,) = rows(capsys, folder, profile_file, f"{text} --predictor oracle")
    (told,) = rows(capsys, folder, profile_file, f"{text} --predictor oracle --profile %/one.safetensors")
    assert oracle["tokens_per_s"] == told["tokens_per_s"] > lru["tokens_per_s"]


def test_presets_take_a_predictor_that_has_learnt_already(
    folder: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a profile, and of whatever shape the model is."""
    learned, _ = fit([make_trace()])
    learned.write(folder / "learned.safetensors")
    spec = f"learned(file='{folder}/learned.safetensors')"
    (row,) = rows(capsys, folder, profile_file, f"%/made.safetensors --preset freetoken --predictor {spec}")
    assert row["predictor"] == spec
    text = "%/made.safetensors --preset freetoken --predictor learned"
    assert "name one with --profile" in run(capsys, folder, profile_file, text, code=2)[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--scheduler dali", "the CPU computes everything: leave it out, or choose another --device, such as gpu"),
        ("--preset fate --scheduler cpu-only", "here the CPU computes everything"),
        ("--experts auto,nf4", '--experts "auto,nf4" names 2 precisions: a --fallback chooses among them'),
        ("--preset fate --experts int8>int4", "names 2 precisions: a --fallback chooses among them"),
        ("--experts auto,nf4 --fallback buddy", "a --fallback chooses among them, and buddy does not"),
        ("--fallback hobbit", "--fallback hobbit needs a lower precision to fall back to"),
        ("--preset fate,hobbit --fallback hobbit", "--fallback hobbit needs a lower precision to fall back to"),
        ("--placement popular", "--placement popular does nothing without a --profile"),
        ("--quota dp --experts nf4", "--quota dp changes with what it has seen of a run"),
        ("--policy lru,lfu --experts nf4", '--policy "lru,lfu": beside presets, or parts of a system'),
        ("--policy all --scheduler gpu-only", '--policy "all": beside presets, or parts of a system'),
        ("--warm-up 1", "--warm-up does nothing with --cold"),
        ("--preset fate --warm-up 1", "--warm-up does nothing with --cold"),
        ("--warm --warm-up 3", "has 3 sequences, and none is left to count"),
        ("--timed --warm --warm-up 3", "has 3 sequences, and none is left to count"),
        ("--preset fate --warm --warm-up 4", "has 3 sequences, and none is left to count"),
        ("--prefetch-depth 2", "--prefetch-depth 2 does nothing without a --predictor"),
        ("--prefetcher fate", "--prefetcher does nothing without a --predictor"),
        ("--preset freetoken --prefetch-depth 2", "none of these presets has one"),
        ("--preset freetoken --prefetcher fate", "--prefetcher fate does nothing without a --predictor"),
        ("--jobs 2", "--jobs does nothing without --sweep"),
        ("--host-capacity 50%", "--host-capacity does nothing without --device gpu"),
        ("--preset fate --host-capacity 50%", "--host-capacity does nothing without --device gpu"),
        ("--preset expertflow --profile %/foreign.safetensors", "name a profile of the same model"),
        ("--experts nf5", "nf5"),
    ],
)
def test_what_would_do_nothing_is_refused(
    folder: Path, profile_file: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, folder, profile_file, f"%/made.safetensors {text}", code=2)
    assert said in err and err.startswith("offload: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("made --policy lru --profile %/one.safetensors", "none learns from a trace"),
        ("made --policy belady --profile %/one.safetensors", "none learns from a trace"),
        ("made --predictor oracle --profile %/one.safetensors", "what knows the future goes by the trace that is repl"),
        ("made --preset freetoken --profile %/one.safetensors", "none learns from a trace"),
        ("made --preset fate --predictor oracle --profile %/one.safetensors", "none learns from a trace"),
        ("made --predictor oracle --prefetch-depth 5", "--prefetch-depth 5: the model has 4 MoE layers, so it looks 4"),
        ("made --preset fate --prefetch-depth 5", "--prefetch-depth 5: the model has 4 MoE layers, so it looks 4"),
        (
            "made --preset fate --prefetch-depth 4",
            "has what gates said 3 layers ahead, and no further",
        ),
        ("plain --preset fate", "has no record of what gates said ahead, which cross-layer-gate goes by"),
        ("plain --predictor ensemble", "has no record of what gates said ahead, which ensemble goes by"),
        ("plain --experts nf4 --prefetch-depth 2", "--prefetch-depth 2 does nothing: with"),
        ("made --fallback hobbit --experts auto,nf4 --prefetcher fate", "with a lossy fallback, nothing is fetched"),
        ("made --preset hybrimoe,freetoken", "hybrimoe, freetoken run without a scheduler"),
        ("made --preset fiddler --policy lru --device gpu", "fiddler begins with empty caches"),
        ("made --preset adapmoe", "adapmoe runs with even shares: every sequence of a cold replay begins anew"),
        ("one --warm", "one.safetensors has one sequence: --warm is as --cold"),
    ],
)
def test_what_has_no_effect_is_said_in_a_line(
    folder: Path, profile_file: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, _, flags = text.partition(" ")
    _, err = run(capsys, folder, profile_file, f"%/{trace}.safetensors --capacity 50% --json {flags}")
    assert sum(said in line for line in err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "text",
    [
        "made --policy static --profile %/one.safetensors",
        "made --quota dp --profile %/one.safetensors",
        "made --predictor transition --profile %/one.safetensors --prefetch-depth 4",
        "made --preset edgemoe --predictor none --profile %/one.safetensors",  # for the importance of experts
        "made --preset fate,hybrimoe --device gpu --host-capacity 80%",
        "made --preset adapmoe --warm",
        "made --preset expertflow",
        "made --experts nf4 --prefetch-depth 3",
    ],
)
def test_of_what_has_an_effect_nothing_is_said(
    folder: Path, profile_file: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, _, flags = text.partition(" ")
    assert run(capsys, folder, profile_file, f"%/{trace}.safetensors --capacity 50% --json {flags}")[1] == ""


def test_a_layers_size_needs_seconds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = command_line.run(capsys, "replay", folder / "made.safetensors", "--dense-layer", "3M", code=2)
    assert "--dense-layer does nothing without seconds" in err
