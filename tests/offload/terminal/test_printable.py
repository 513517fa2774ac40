"""What a file, a server or a model says does not steer the terminal: no control character reaches it."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from cache.errors import OffloadError
from offload.system import messages
from offload.system.progress import progress_bar
from offload.system.text import printable
from offload.terminal import console

EVIL = "a\x1b[2Jb\x07\x9b1m\u200dé👍"
SAFE = "a[2Jb1m\u200dé👍"


def test_control_characters_are_left_out_and_lines_stay() -> None:
    assert printable(EVIL + "\n\tc") == SAFE + "\n\tc"


def test_messages(capsys: pytest.CaptureFixture[str]) -> None:
    messages.error(OffloadError(EVIL))
    messages.warning(EVIL)
    assert capsys.readouterr().err == f"offload: error: {SAFE}\noffload: warning: {SAFE}\n"


def test_tables_lines_and_titles(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL + ":smile:")
    console.answers().print(table)
    console.answers().print(EVIL)
    console.dim(EVIL)
    shown = capsys.readouterr()
    assert shown.out.count(SAFE) == 4 and SAFE + ":smile:" in shown.out
    assert not {"\x1b", "\x9b", "\x07"} & {*shown.out, *shown.err}


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    with progress_bar(EVIL, 2, show=True, keep=True) as bar:
        bar.say(EVIL)
        bar.update(title=EVIL + "!", done=2)
    assert SAFE + "!" in shown.getvalue() and shown.getvalue().count(SAFE) >= 2
    assert not {"\x9b", "\x07"} & {*shown.getvalue()} and "\x1b[2J" not in shown.getvalue()


@pytest.mark.parametrize("where", ["config", "tensor", "folder"])
def test_names_in_a_checkpoint(run: Any, checkpoint: str, tmp_path: Path, where: str) -> None:
    folder = tmp_path / ("m" + (EVIL if where == "folder" else ""))
    folder.mkdir()
    for file in Path(checkpoint).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if where == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": EVIL, "architectures": [EVIL]}))
    elif where == "tensor":
        header = json.dumps({EVIL: {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
        weights = len(header).to_bytes(8, "little") + header + bytes(8)
        (folder / "model.safetensors").write_bytes(weights)
    result = run("plan", os.fspath(folder))
    assert result.code == (0 if where == "folder" else 2)
    assert "a[2Jb1m" in result.out + result.err
    assert not {"\x1b", "\x9b", "\x07"} & {*result.out, *result.err}


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", '"é日"'), ("latin-1", r'"\u00e9\u65e5"'), ("ascii", r'"\u00e9\u65e5"')]
)
def test_json_is_in_letters_that_the_output_has(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    monkeypatch.setattr(sys, "stdout", output)
    console.print_json("é日")
    output.seek(0)
    assert output.read() == shown + "\n"


def test_json_keeps_what_a_terminal_would_obey_and_what_no_encoding_has(capsys: pytest.CaptureFixture[str]) -> None:
    value = ["a\x1b[2J\x7f\x9b1m", "b\udcff"]
    console.print_json(value)
    shown = capsys.readouterr().out
    assert shown.isascii() and shown.strip().isprintable()
    assert json.loads(shown) == value
