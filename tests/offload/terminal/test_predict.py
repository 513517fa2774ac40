"""`offload predict`: tables and JSON, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import pytest
from traces import random_trace, recorded

from predictors.base import names


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("traces") / "made.safetensors"
    random_trace(lengths=(30, 20), layers=4).write(file)
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of `offload predict` with `arguments`."""
    return command_line.run(capsys, "predict", *arguments, code=code)


def test_json_has_every_figure(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    chosen = "frequency,transition(order=2, reach=1),oracle"
    out, _ = run(capsys, path, path, "--predictor", chosen, "--profile", path, "--depth", 2, "--json")
    rows = json.loads(out)
    assert [row["predictor"] for row in rows] == ["frequency", "transition", "oracle"] * 2
    assert [row["profile"] for row in rows[:3]] == [None, str(path), None]
    assert rows[1]["params"] == {"order": 2, "reach": 1} and rows[1]["spec"] == "transition(order=2, reach=1)"
    assert rows[:3] == rows[3:]
    assert rows[0]["trace"] == str(path)
    for row in rows:
        assert set(row["recall"]) == {"1", "2"} and set(row["recall"]["1"]) == {"K", "K+2", "2K"}
        assert len(row["by_layer"]["1"]) == 4 and len(row["calibration"]["2"]) == 10
    assert rows[2]["recall"]["2"]["K"] == 1.0


def test_tables_and_what_is_left_out(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    out, err = run(capsys, path)
    for name in names():
        assert (f" {name} " in out) == (name not in ("expert-map", "learned"))
    assert "expert-map is left out: it learns from a recorded trace; name one with --profile" in err
    assert "has no record of what gates said ahead, which cross-layer-gate goes by" in err
    assert "recall@K+2" in out and "decoding, 198 events" in out and "prompts" not in out
    out, _ = run(capsys, path, "--profile", path, "--predictor", "expert-map")
    assert "made.safetensors" in out and "expert-map" in out


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], path: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((path, "--predictor", "fate"), 'no predictor is called "fate"'),
        ((path, "--predictor", "expert-map"), 'predictor "expert-map" learns from a recorded trace: name one'),
        ((path, "--predictor", "frequency,,none"), "empty part"),
        ((tmp_path / "none.safetensors", "--predictor", "none"), "none.safetensors"),
    ):
        out, err = run(capsys, *arguments, code=2)
        assert out == "" and said in err and err.count("\n") == 1
    other = tmp_path / "other.safetensors"
    random_trace(layers=3).write(other)
    _, err = run(capsys, path, "--predictor", "transition", "--profile", other, code=2)
    assert "has 3 layers of 6 experts, not 4 of 6: name a profile of the same model" in err


def test_what_has_no_effect_is_said(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    _, err = run(capsys, path, "--predictor", "oracle,frequency", "--profile", path, "--depth", 9)
    assert "does nothing: none of these predictors learns from a trace" in err and err.count("\n") == 2
    assert "--depth 9: " in err and "has 4 layers, so it looks 4 ahead" in err
    assert run(capsys, path, "--predictor", "oracle,transition", "--profile", path, "--depth", 4)[1] == ""


def test_a_real_trace_is_predicted_far_better_than_by_chance() -> None:
    """Chance is 4 of 32 experts; the figures are those of the first sequences of a recorded trace."""
    from predictors.base import make_predictor
    from predictors.evaluate import evaluate

    trace = recorded("gpt-oss-20b.mmlu.small")
    few = trace.select(range(2))
    recalls = {}
    for name in ("frequency", "transition", "logistic"):
        made = make_predictor(name, few.num_layers, few.num_experts)
        recalls[name] = evaluate(made, few, depth=1).as_dict()["recall"]["1"]["K"]
    assert 0.3 < recalls["frequency"] < recalls["transition"] < recalls["logistic"] < 0.9
