"""Errors that nobody foresaw: one line with the place, the traceback in a file, exit code 1, never a bare traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_chat import environment, run_program

from cache.traces.trace import Trace
from offload.options import LoadOptions
from offload.terminal import loading
from offload.terminal import main as cli

LINE = "offload: error: unexpected "


@pytest.fixture
def failing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[..., object]], tuple[str, str]]:
    """What is said when loading a model ends in something else, and the traceback that was kept."""
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))

    def failing(load: Callable[..., object]) -> tuple[str, str]:
        monkeypatch.setattr(loading, "load_model", load)
        result = run("generate", "tiny", "--prompt", "x")
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        (kept,) = (tmp_path / "cache" / "tracebacks").iterdir()
        assert str(kept) in result.err
        return result.err, kept.read_text()

    return failing


def lookup(name: str, options: LoadOptions) -> object:
    return {}["layer\x1b[2J 7\n"]


def test_it_is_one_line_with_the_place_in_the_program_and_a_file(failing: Any) -> None:
    said, kept = failing(lookup)
    assert said.startswith(f"{LINE}KeyError: 'layer\\x1b[2J 7\\n' (offload/terminal/commands/model.py:")
    assert "please report it with its traceback, which is in " in said
    assert "in lookup" in kept and "Python 3" in kept


def test_what_a_rust_library_raises_is_one_line_too(failing: Any) -> None:
    class PanicException(BaseException):
        pass

    def panic(name: str, options: LoadOptions) -> object:
        raise PanicException("index out of bounds")

    said, _ = failing(panic)
    assert said.startswith(f"{LINE}PanicException: index out of bounds (offload/")


def test_an_error_without_words_is_named(failing: Any) -> None:
    def check(name: str, options: LoadOptions) -> object:
        raise AssertionError

    assert failing(check)[0].startswith(f"{LINE}AssertionError (offload/")


def test_only_the_last_tracebacks_are_kept(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tracebacks"
    folder.mkdir()
    for number in range(30):
        (folder / f"2000-01-{number:02}.txt").touch()
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "load_model", lookup)
    assert run("generate", "tiny", "--prompt", "x").code == 1
    left = sorted(file.name for file in folder.iterdir())
    assert len(left) == 20 and left[0] == "2000-01-11.txt" and left[-1] > "2001"


def test_where_it_cannot_be_kept_the_line_says_how_to_see_it(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(loading, "load_model", lookup)
    result = run("generate", "tiny", "--prompt", "x")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "please report it with the traceback that --debug shows (it could not be kept: " in result.err


def test_debug_shows_the_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", lookup)
    with pytest.raises(KeyError):
        cli.main(["generate", "tiny", "--prompt", "x", "--debug"])


def test_a_thread_that_fails_is_one_line(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, options: LoadOptions) -> object:
        thread = threading.Thread(target=lookup, args=(name, options))
        thread.start()
        thread.join()
        sys.exit(0)

    before = threading.excepthook
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "load_model", load)
    result = run("generate", "tiny", "--prompt", "x")
    assert result.err.startswith(f"{LINE}KeyError: ") and result.err.count("\n") == 1
    assert threading.excepthook is before


FINALIZER = """
class Model:
    def __del__(self):
        1 / 0
from offload.terminal import loading
loading.load_model = lambda name, options: (Model() and None) or exit(0)
"""


def test_a_finalizer_that_fails_is_one_line() -> None:
    said = run_program("generate", "tiny", "--prompt", "x", program=FINALIZER).stderr
    assert said.startswith("offload: warning: ZeroDivisionError: division by zero (") and said.count("\n") == 1


PARTS = """
from cache.policy import EvictionPolicy
import os, signal

class Two(Exception):
    def __init__(self, one, two):
        super().__init__(one)

class Worth(EvictionPolicy):
    def priorities(self, lanes):
        return self.score

class Own(EvictionPolicy):
    def priorities(self, lanes):
        raise Two("this error cannot be sent", "to another process")

class Killed(EvictionPolicy):
    def priorities(self, lanes):
        os.kill(os.getpid(), signal.SIGKILL)

class Slow(EvictionPolicy):
    def priorities(self, lanes):
        open(f"began-{os.getpid()}", "w").close()
        signal.pause()
"""
BROKEN = """
import sys
class Two(Exception):
    def __init__(self, one, two):
        super().__init__(one)
def broken(*_):
    raise {error}
import offload.simulation.sweep
offload.simulation.sweep.replay_one = broken
from offload.terminal.main import main
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A sweep in two processes, all but its policies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(8), (20, 2, 1)), axis=-1)[..., :2]
    Trace.from_arrays(experts, np.ones(experts.shape), [0, 20], num_experts=8).write("trace.safetensors")
    Path("failing_parts.py").write_text(PARTS)
    return ["replay", "trace.safetensors", "--capacity", "40%", "--sweep", "rows", "--jobs", "2", "--policy"]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("Worth", "eviction policy \"failing_parts:Worth\" raised AttributeError: 'Worth' object has no attribute"),
        ("Own", 'eviction policy "failing_parts:Own" raised Two: this error cannot be sent'),
        ("Killed", "a process that computed was killed, perhaps for want of memory"),
    ],
)
def test_a_part_that_fails_in_a_process_of_a_sweep_is_named(sweep: list[str], part: str, said: str) -> None:
    done = run_program(*sweep, f"lru,failing_parts:{part}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"offload: error: {said}")


@pytest.mark.parametrize(
    ("error", "said"), [("KeyError('x')", "KeyError: 'x'"), ("Two('x', 'y')", "RuntimeError: Two: x")]
)
def test_an_error_of_ours_in_a_process_of_a_sweep_is_one_line_with_its_place(
    sweep: list[str], error: str, said: str
) -> None:
    Path("program.py").write_text(BROKEN.format(error=error))
    command = [sys.executable, "program.py", *sweep, "lru,fifo"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"{LINE}{said} (offload/simulation/sweep.py:")


def test_ctrl_c_in_a_sweep_is_told_once(sweep: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "offload", *sweep, "failing_parts:Slow,fifo,lru", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, start_new_session=True, env=environment()) as process:
        rows = tmp_path / "rows"  # of LRU, FIFO and Belady's two: then one process waits, and one computes
        while not (list(tmp_path.glob("began-*")) and rows.exists() and rows.read_text().count("\n") == 4):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None and process.stdout is not None
        said, found = process.stderr.read().decode().splitlines(), json.loads(process.stdout.read())
    assert said[0] == "offload: stopped: 4 of 5 replays are done: run it again to go on"
    assert not any("interrupted" in line or "Error" in line for line in said)
    assert [row["policy"] for row in found] == ["belady", "belady-bypass", "fifo", "lru"]
    assert process.returncode == 130
