"""What `--help` shows: whole paragraphs, switches without values, and groups that say what is in them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from offload.terminal.app import COMMANDS, TRACE_COMMANDS

EVERY = [*COMMANDS, *(f"trace {name}" for name in TRACE_COMMANDS)]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", EVERY)
def test_a_paragraph_is_broken_only_where_the_terminal_ends(run: Any, command: str) -> None:
    """No word that would have fitted on a line stands on the next one."""
    text = run(*command.split(), "--help").out.split("╭", 1)[0]
    lines = [line.strip() for line in text.splitlines()]
    for line, following in itertools.pairwise(lines):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > 78, line


@pytest.mark.parametrize("command", ["", "trace", *EVERY])
def test_a_switch_takes_no_value(run: Any, command: str) -> None:
    shown = run(*command.split(), "--help").out
    assert "--help" in shown and "<bool>" not in shown


@pytest.mark.parametrize("command", ["replay", "predict", "train-predictor"])
def test_usage_has_the_dots_of_several_arguments_once(run: Any, command: str) -> None:
    assert re.search(rf"Usage: offload {command} \[OPTIONS\] {{TRACE}}\.\.\.\s", run(command, "--help").out)


def test_what_decides_is_a_group_of_its_own(run: Any) -> None:
    groups = dict(re.findall(r"╭─ ([\w ]+) ─+╮\n(.*?)╰", run("chat", "--help-all").out, re.DOTALL))
    flags = {name: re.findall(r"^│ +(--[a-z-]+)", group, re.MULTILINE) for name, group in groups.items()}
    assert flags["Memory"] == ["--gpu-mem", "--cpu-mem", "--expert-cache", "--context"]
    assert {"--scheduler", "--policy", "--predictor", "--prefill"} <= set(flags["Decisions"])
