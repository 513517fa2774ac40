"""Standard streams that are closed, full or of another kind: what is lost of an answer is told, and nothing else."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_chat import environment


def redirected(how: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of the program where a shell redirects its streams."""
    command = shlex.join([sys.executable, "-m", "offload", *arguments])
    environ = {**environment(), **variables}
    done = subprocess.run(["sh", "-c", f"{command} {how}"], capture_output=True, text=True, env=environ, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("how", [">/dev/full", ">&-", "<&- >&-"])
def test_an_answer_that_cannot_be_written_is_one_line(how: str) -> None:
    said = "it is closed" if ">&-" in how else "no space left on device"
    for variables in ({}, {"PYTHONUNBUFFERED": "1"}):
        code, _, err = redirected(how, "--version", **variables)
        assert (code, err) == (2, f"offload: error: standard output: {said}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("how", ["2>/dev/full", "2>&-"])
def test_what_is_said_beside_an_answer_may_be_lost(checkpoint: str, how: str) -> None:
    assert "no prediction of speeds" in redirected("", "plan", checkpoint, "--json")[2]
    code, out, err = redirected(how, "plan", checkpoint, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)
    assert redirected(how, "plan", "not there") == (2, "", "")


def test_closed_streams_leave_their_numbers_to_no_file() -> None:
    code = "from offload.system import quiet; import os; quiet.prepare(); print(os.open('/', 0) > 2)"
    command = f"{shlex.join([sys.executable, '-c', code])} <&- 2>&-"
    assert subprocess.check_output(["sh", "-c", command], text=True, env=environment()) == "True\n"


@pytest.mark.parametrize(("how", "said"), [("<&-", "the prompt is empty"), ("0>nothing", "standard input: ")])
def test_a_prompt_that_cannot_be_read(how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = redirected(how, "chat", "tiny")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"offload: error: {said}")
