"""What the program says in one line, above all of files that the operating system refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cache.errors import OffloadError
from offload.system import messages
from offload.terminal.main import main


def said(capsys: pytest.CaptureFixture[str], error: object) -> str:
    messages.error(error)
    return capsys.readouterr().err.removeprefix("offload: error: ")


def test_errors_are_one_line_whatever_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, OffloadError("a\n  b")) == "a b\n"


def test_a_line_has_an_end_however_long_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, OffloadError(f"M: {'x' * 10**6} is no number"))
    assert line.startswith("M: xxx") and line.endswith("xxx is no number\n")
    assert len(line) < 2000


def test_what_a_file_lacks_stands_behind_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, lacks in (
        (tmp_path / "P.jsonl", "no such file"),
        (tmp_path / "a" / "P.jsonl", f"no such file, nor a folder {tmp_path / 'a'}"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(OSError) as refused:
            path.open("r+")
        assert said(capsys, refused.value) == f"{path}: {lacks}\n"


@pytest.mark.parametrize("below", ["", "experts/store"])
def test_a_cache_folder_that_cannot_be_used_is_said_with_what_to_do(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "deeper"):
        monkeypatch.setenv("OFFLOAD_CACHE", str(cache))
        with pytest.raises(OSError) as refused:
            (cache / below).mkdir(parents=True, exist_ok=True)
        assert said(capsys, refused.value).endswith(
            f" (offload keeps its files in {cache}: set OFFLOAD_CACHE to a folder that you may write to)\n"
        )


def test_a_file_of_a_folder_that_may_not_be_entered_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "file"))

    def refuse(path: Path) -> bool:
        raise denied

    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "is_dir", refuse)
    messages.error(denied)
    assert capsys.readouterr().err == f"offload: error: {tmp_path / 'file'}: permission denied\n"


def test_a_name_that_begins_like_an_option_is_said_with_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("offload.system.quiet.prepare", lambda: None)  # it sets up the whole process
    with pytest.raises(SystemExit):
        main(["plan", "-tiny"])
    told = "-tiny is taken for an option: write ./-tiny for what lies here"
    assert capsys.readouterr().err == f"offload: error: {told}\n"


def test_an_error_without_a_file_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, OSError("no network")) == "no network\n"
    both = OSError(18, "Invalid cross-device link", "a", None, "b")
    assert said(capsys, both) == f"{both}\n"


@pytest.mark.parametrize(
    "command",
    [
        ("trace", "record", "M", "--prompts", "F", "-o", "out"),
        ("trace", "info", "F"),
        ("calibrate", "M", "--prompts", "F"),
        ("eval", "M", "--text", "F"),
        ("eval", "M", "--prompts", "F"),
        ("replay", "F"),
        ("replay", "F", "--profile", "F"),
        ("predict", "F", "--predictor", "none"),
        ("train-predictor", "F", "-o", "out"),
        ("plan", "M", "--trace", "F"),
        ("bench", "M", "--trace", "F"),
    ],
)
def test_every_command_says_so_of_a_file_that_is_not_there(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("offload.system.quiet.prepare", lambda: None)  # it sets up the whole process
    with pytest.raises(SystemExit) as exited:
        main(command)
    assert exited.value.code == 2
    assert capsys.readouterr().err == "offload: error: F: no such file\n"


def test_a_file_that_is_not_there_is_said_where_the_working_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError) as refused:
        Path("P.jsonl").stat()
    assert said(capsys, refused.value).startswith("P.jsonl: no such file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stderr", full)
        monkeypatch.setattr("offload.system.quiet.prepare", lambda: None)  # it sets up the whole process
        with pytest.raises(SystemExit) as exited:
            main(["generate"])
        monkeypatch.undo()
        assert exited.value.code == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what is still buffered
