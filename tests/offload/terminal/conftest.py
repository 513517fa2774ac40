"""The command line in this process, on a tiny model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import Resident, save_checkpoint

from offload.system import quiet
from offload.terminal import loading
from offload.terminal import main as cli
from scripts.fuzz.tokenizer import tiny_tokenizer


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Callable[..., Result]:
    """Runs the command line in this process, on the tiny model unless a test puts another in its place."""
    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process
    monkeypatch.setattr(
        loading, "load_model", lambda name, options: Resident(options.context or 4096, tiny_tokenizer())
    )

    def run(*arguments: str, stdin: str = "") -> Result:
        piped = tmp_path / "stdin"
        piped.write_text(stdin)
        with piped.open() as source, monkeypatch.context() as patch, pytest.raises(SystemExit) as exited:
            patch.setattr(sys, "stdin", source)
            cli.main(arguments)
        shown = capsys.readouterr()
        return Result(exited.value.code, shown.out, shown.err)

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("tiny")))
