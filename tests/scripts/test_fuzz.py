"""The fuzzer of inputs: it notices what may not be, and on a few dozen inputs finds nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import fuzz_inputs
from scripts.fuzz import resident, worker
from scripts.fuzz.case import Case, make_case
from scripts.fuzz.checkpoints import write_checkpoints
from scripts.fuzz.commands import Command
from scripts.fuzz.verdict import judge_refusal


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


def right(originals: Mapping[str, Path]) -> Case:
    words = ["--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--seed", "7", "--json"]
    folder = originals["gpt_oss"]
    return Case(0, folder, folder, [], Command("generate", words, lossy=False), renamed=False)


def test_the_same_number_is_the_same_input(originals: Mapping[str, Path], tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}

    for number in range(30):
        first, second = (make_case(3, number, originals, tmp_path / f"{number}{side}") for side in "ab")
        assert (first.changes, first.command) == (second.changes, second.command)
        assert files(first.folder) == files(second.folder)


def test_a_right_answer_is_good(originals: Mapping[str, Path], stdin: None) -> None:
    assert worker.run(right(originals)).kind == "answered"


def test_another_answer_is_wrong(originals: Mapping[str, Path], stdin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "answers", lambda case, said, mended: [[*said["token_ids"][:-1], 3]])
    assert worker.run(right(originals)).kind == "wrong"


def test_an_answer_that_transformers_refuses_is_wrong(
    originals: Mapping[str, Path], stdin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(folder: Path) -> Any:
        raise ValueError("no such model")

    monkeypatch.setattr(resident, "_load", refuses)
    verdict = worker.run(right(originals))
    assert verdict.kind == "wrong"
    assert "no such model" in verdict.line


@pytest.mark.parametrize(
    "settings", [b'{"repetition_penalty": 2}', b'\xef\xbb\xbf{"forced_eos_token_id": [0]}'], ids=["whole", "marked"]
)
def test_settings_that_transformers_reads_otherwise_are_judged_by_what_they_mean(
    originals: Mapping[str, Path], stdin: None, tmp_path: Path, settings: bytes
) -> None:
    """It refuses 2 where 2.0 is meant, and passes over a file that begins with a byte order mark."""
    folder = tmp_path / "model"
    shutil.copytree(originals["qwen3_moe"], folder)
    (folder / "generation_config.json").write_bytes(settings)
    assert worker.run(replace(right(originals), folder=folder)).kind == "answered"


@pytest.mark.parametrize("error", [ZeroDivisionError, RecursionError, SystemError])
def test_an_exception_is_a_finding(
    originals: Mapping[str, Path], stdin: None, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("offload.terminal.app.run", fails)
    assert worker.run(right(originals)).kind == "traceback"


@pytest.mark.parametrize(
    ("code", "err", "kind"),
    [
        (2, "offload: error: no\n", "refused"),
        (2, "offload: warning: odd\noffload: error: no\n", "refused"),
        (2, "", "wrong"),
        (2, "offload: error: no\nand more\n", "wrong"),
        (2, "offload: error: \x1b[31mno\n", "wrong"),
        (2, f"offload: error: {'x' * 5000}\n", "wrong"),
        (1, "offload: error: no\n", "traceback"),
        (2, "Traceback (most recent call last):\noffload: error: no\n", "traceback"),
    ],
)
def test_a_refusal_is_one_line(code: int, err: str, kind: str) -> None:
    assert judge_refusal(code, err).kind == kind


def test_a_hang_and_a_crash_are_noticed(originals: Mapping[str, Path], tmp_path: Path) -> None:
    running = fuzz_inputs.Worker(0, originals, tmp_path, patience=0.0)
    try:
        assert running.run(0)[1].kind == "hang"
        running._start()
        os.kill(running._process.pid, signal.SIGKILL)
        running._process.join()
        assert running.run(0)[1].kind == "crash"
    finally:
        running.close()


def test_what_is_found_is_told_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz_inputs, "Worker", _always(lambda number: "crash" if number == 1 else "refused"))
    assert fuzz_inputs.main(["--inputs", "3", "--workers", "1", "--keep", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "crash: 1\n    why\n3 inputs, seed 0: answered 0, planned 0, refused 2, traceback 0, crash 1" in said


def _always(kind_of: Callable[[int], Any]) -> Any:
    class Always:
        def __init__(self, *_: object) -> None: ...

        def run(self, number: int) -> tuple[str, fuzz_inputs.Verdict]:
            return str(number), fuzz_inputs.Verdict(kind_of(number), "why")

        def close(self) -> None: ...

    return Always


@pytest.mark.parametrize("inputs", [24, pytest.param(80, marks=pytest.mark.full)])
def test_a_few_dozen_inputs_find_nothing(inputs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = fuzz_inputs.main(["--inputs", str(inputs), "--workers", "1", "--patience", "600", "--keep", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
