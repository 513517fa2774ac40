"""Ctrl-C in a replay: what is done is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import pytest
from made_trace import make_trace

from offload.simulation.presets import PresetTask
from offload.simulation.sweep import Task

PRESETS = ["--preset", "freetoken,fate", "--capacity", "25%,50%"]
POLICIES = ["--policy", "lfu", "--capacity", "25%,50%"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "made.safetensors"
    make_trace(tokens=10, sequences=1).write(file)
    return file


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has Ctrl-C come in the replay after so many."""

    def stop(count: int) -> None:
        ran: list[object] = []

        def stopped(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def once(task: Any) -> Any:
                if len(ran) == count:
                    raise KeyboardInterrupt
                ran.append(task)
                return run(task)

            return once

        for kind in (Task, PresetTask):
            monkeypatch.setattr(kind, "run", stopped(kind.run))

    return stop


@pytest.mark.parametrize(("flags", "total"), [(PRESETS, 4), (POLICIES, 4)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_so_far_are_printed(
    path: Path,
    profile_file: Path,
    stop_after: Callable[[int], None],
    flags: list[str],
    total: int,
    count: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["replay", path, "--machine", profile_file, *flags]
    whole = json.loads(command_line.run(capsys, *arguments, "--json")[0])
    stop_after(count)
    out, err = command_line.run(capsys, *arguments, "--json", code=130)
    found = json.loads(out)
    each = len(whole) // total
    assert len(found) == count * each
    assert err.count(f"stopped: {count} of {total} replays are done") == 1 and "interrupted" not in err
    if flags is PRESETS:
        assert {(row["preset"], row["capacity"], row["tokens_per_s"]) for row in found} <= {
            (row["preset"], row["capacity"], row["tokens_per_s"]) for row in whole
        }
        assert all(row["rank"] > 0 for row in found)


def test_the_table_has_them_and_the_next_run_goes_on(
    path: Path,
    tmp_path: Path,
    profile_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "rows.jsonl"
    arguments = ["replay", path, "--machine", profile_file, *PRESETS, "--sweep", store, "--jobs", 1]
    with monkeypatch.context() as patch:
        patch.setattr(PresetTask, "run", PresetTask.run)  # undone at the end of the block
        stop_after(3)
        out, err = command_line.run(capsys, *arguments, code=130)
    assert out.count("made.safetensors:") == 2 and out.count("freetoken") == 2 and out.count("fate") == 1
    assert "run it again to go on" in err and len(store.read_text().splitlines()) == 3
