"""Every command with an output file refuses a place where none can be put, before it loads, measures or computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
from command_line import run
from traces import random_trace

from offload.machine import measure
from offload.system import quiet
from offload.terminal import loading

COMMANDS = {
    "record": ["trace", "record", "model", "--prompts", "prompts", "--force", "-o"],
    "calibrate": ["calibrate", "model", "--prompts", "prompts", "-o"],
    "train": ["train-predictor", "trace", "-o"],
    "profile": ["profile", "--out"],
    "replay": ["replay", "trace", "--plot"],
    "info": ["trace", "info", "trace", "--plot"],
}
PLOTS = ("replay", "info")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with all that the commands read, where nothing is loaded or measured."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process
    monkeypatch.setattr(loading, "load_model", never)
    monkeypatch.setattr(measure, "measure_machine", never)
    monkeypatch.setattr("predictors.training.fit", never)
    monkeypatch.setattr("offload.traces.info.trace_info", never)
    monkeypatch.setattr("offload.simulation.sweep.Task.run", never)
    monkeypatch.chdir(tmp_path)
    Path("prompts").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    random_trace().write("trace")
    os.mkfifo("pipe.png")
    Path("folder.png").mkdir()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("pipe.png", "pipe.png is no regular file, which a result would replace: choose another name"),
        ("folder.png", "folder.png is a folder: name a file in it"),
        ("not/there/x.png", "not/there/x.png cannot be written: there is no folder not/there: make it, or choose "),
        ("trace/x.png", "trace/x.png cannot be written: trace is no folder"),
    ],
)
def test_a_place_for_no_file(command: str, place: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command in PLOTS:
        pytest.importorskip("matplotlib")
    before = sorted(Path().rglob("*"))
    out, err = run(capsys, *COMMANDS[command], place, code=2)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"offload: error: {said}")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("command", PLOTS)
def test_a_figure_of_no_format_that_is_known(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for place in ("figure", "figure.txt"):
        _, err = run(capsys, *COMMANDS[command], place, code=2)
        assert err.startswith(f"offload: error: --plot {place}: a figure is .")
        assert " .png, " in err


@pytest.mark.parametrize("arguments", [["convert", "m", "-o"], ["plan", "m", "--expert-store"]], ids=" ".join)
def test_a_store_in_no_folder(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save(Path("m"), "mixtral")
    capsys.readouterr()
    out, err = run(capsys, *arguments, "not/there/x", "--experts", "int8", code=2)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("offload: error: not/there/x cannot be written: there is no folder not/there: make it")
    assert not Path("not").exists()
