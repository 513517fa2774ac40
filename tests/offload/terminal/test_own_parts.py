"""A part of the user's own that fails while the model runs: one line says which, and --debug has the traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from offload.system import quiet
from offload.terminal import main as cli

PARTS = """
from cache.policy import EvictionPolicy
from cache.quota import Quota
from offload.decide.fallbacks.base import Fallback
from offload.decide.schedulers.base import Scheduler
from predictors.base import Predictor

class Worth(EvictionPolicy):
    def priorities(self, lanes):
        return [self.score for _ in "two"]

class Third(Quota):
    def divide(self, total):
        return {}[total]

class Next(Predictor):
    def observe(self, event):
        raise KeyError("layer 7")

    def predict(self, depth):
        return []

class Half(Scheduler):
    def assign(self, loads, costs):
        return loads[len(loads)]

class Low(Fallback):
    def choose(self, event, candidates, spare_s):
        return 1 / 0
"""
SMALL = ("--device", "emulated", "--gpu-mem", "1G", "--cpu-mem", "8G", "--link", "2GB/s", "--context", "64")
RUN = ("--prompt-ids", "1,2,3,4", "--max-new-tokens", "2", "--threads", "1", "--expert-cache", "20K")


@pytest.fixture
def failing(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Standard error of a run with parts that fail, by a module of the working directory."""
    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "failing_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exited:
            cli.main(["generate", checkpoint, *RUN, *SMALL, *arguments])
        shown = capsys.readouterr()
        assert (exited.value.code, shown.out) == (2, "")
        return shown.err

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--policy", "failing_parts:Worth"), "eviction policy \"failing_parts:Worth\" raised AttributeError: 'Worth'"),
        (("--quota", "failing_parts:Third"), 'quota "failing_parts:Third" raised KeyError: '),
        (("--predictor", "failing_parts:Next"), "predictor \"failing_parts:Next\" raised KeyError: 'layer 7'"),
        (("--scheduler", "failing_parts:Half"), 'scheduler "failing_parts:Half" raised IndexError: '),
        (
            ("--experts", "auto,int8", "--fallback", "failing_parts:Low"),
            'fallback "failing_parts:Low" raised ZeroDivisionError: division by zero',
        ),
    ],
)
def test_it_is_named_in_one_line(failing: Callable[..., str], flags: tuple[str, ...], said: str) -> None:
    error = failing(*flags)
    assert said in error and error.splitlines()[-1].startswith("offload: error: ") and "Traceback" not in error


def test_debug_has_the_traceback(failing: Callable[..., str]) -> None:
    with pytest.raises(AttributeError, match="'Worth' object has no attribute 'score'"):
        failing("--policy", "failing_parts:Worth", "--debug")
