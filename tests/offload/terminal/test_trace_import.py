"""`offload trace import`: a log in, a trace out; Ctrl-C, and what is no log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.traces.trace import Trace


def one_line(result: Any) -> str:
    """The error of a run that a user's mistake ended."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("offload: error: ") and result.err.count("\n") == 1
    return str(result.err)


@pytest.fixture
def trace(run: Any) -> Callable[..., Any]:
    """Runs `offload trace ...`."""
    return lambda *arguments: run("trace", *map(str, arguments))


def test_a_log_becomes_a_trace(trace: Any, tmp_path: Path) -> None:
    lines = [{"routed_experts": [[[0, 1]], [[2, 3]], [[3, 0]]], "prompt_tokens": n} for n in (1, 2)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["import", tmp_path / "log.jsonl", tmp_path / "t", "--num-experts", 4]
    result = trace(*arguments, "--model", "Qwen/M", "--workload", "W", "--layers", "0")
    assert (result.code, result.out) == (0, "") and "2 sequences of vllm" in result.err
    found = Trace.open(tmp_path / "t")
    assert (found.model, found.workload, found.num_tokens) == ("Qwen/M", "W", 6)
    assert (found.phase == 0).sum() == 3
    assert "2 sequences" in trace("info", tmp_path / "t").out
    assert "exists: choose another name" in one_line(trace(*arguments))
    assert trace(*arguments, "--force", "--limit", 1).code == 0
    assert Trace.open(tmp_path / "t").num_sequences == 1


def test_a_log_that_is_none_is_one_line(trace: Any, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"routed_experts": [[[0, 9]]]}')
    asked = ["import", tmp_path / "log.jsonl", tmp_path / "t"]
    assert "give --num-experts" in one_line(trace(*asked))
    assert "line 1: token 0, layer 0: expert 9 of 4" in one_line(trace(*asked, "--num-experts", 4))
    assert "write ascending numbers" in one_line(trace(*asked, "--num-experts", 4, "--layers", "2,1"))
    assert "nowhere.npz" in one_line(trace("import", tmp_path / "nowhere.npz", tmp_path / "t"))
    assert "choose one of auto" in one_line(trace(*asked, "--format", "x"))
    assert not (tmp_path / "t").exists()


def test_ctrl_c_keeps_the_sequences_that_were_imported(
    trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.system.progress import Bar

    def press(self: Bar, count: int = 1) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bar, "advance", press)
    (tmp_path / "log.jsonl").write_text('{"routed_experts": [[[0, 1]]]}\n' * 3)
    result = trace("import", tmp_path / "log.jsonl", tmp_path / "t", "--num-experts", 4)
    assert result.code == 130 and f"stopped: {tmp_path / 't'} has the 1 finished of 3 sequences" in result.err
    assert Trace.open(tmp_path / "t").num_sequences == 1
