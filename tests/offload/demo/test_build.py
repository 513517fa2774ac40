"""A build of the demo that survives kills, damage and full disks."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest
import tiny_demo
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache.errors import DiskSpaceError, OffloadError
from offload.demo import build as demo
from offload.demo import gguf


def test_it_builds_once_what_transformers_loads(tiny: tiny_demo.Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder = demo.demo_path()
    assert folder.parent == tiny.cache
    assert capsys.readouterr() == ("", "")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("hello wörld")["input_ids"]) == "hello wörld"
    out = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 7
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo.demo_path() == folder
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_progress_goes_to_stderr(
    tiny: tiny_demo.Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    demo.demo_path(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "carving" in err


def test_a_new_carve_is_built_beside_the_old_one(tiny: tiny_demo.Tiny) -> None:
    first = demo.demo_path()
    tiny_demo.carve(demo.DATA_FILE, seed=2)
    second = demo.demo_path()
    assert first != second
    assert first.is_dir() and second.is_dir()


@pytest.mark.parametrize("harm", ["truncate", "delete", "manifest"])
def test_a_damaged_build_is_made_again(tiny: tiny_demo.Tiny, harm: str) -> None:
    folder = demo.demo_path()
    good = tiny_demo.files(folder)
    if harm == "truncate":
        with (folder / "model.safetensors").open("rb+") as file:
            file.truncate(100)
    elif harm == "delete":
        (folder / "config.json").unlink()
    else:
        (folder / "offload-demo.json").write_text("{")
    assert demo.demo_path() == folder
    assert tiny_demo.files(folder) == good


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a POSIX signal")
@pytest.mark.parametrize(
    "moment",
    [
        "demo.write_checkpoint",
        "demo.open_dense",
        "built.fsync_folder",
        "built.os.fsync",
        "gguf.LlamaGGUF.save_tokenizer",
    ],
)
def test_a_killed_build_is_made_again(tiny: tiny_demo.Tiny, moment: str) -> None:
    """The child dies at `moment`, with no chance to clean up; the next start does not notice."""
    victim = tiny_demo.child(tiny, f"from offload.demo import built, gguf\n{moment} = killed\ndemo.demo_path()")
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    folder = demo.demo_path()
    names = {path.name for path in tiny.cache.iterdir()}
    assert names == {folder.name, "downloads", "demo.lock"}
    tiny_demo.load(folder)


def test_an_interrupt_leaves_nothing_behind(tiny: tiny_demo.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.LlamaGGUF, "save_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_path()
    assert {path.name for path in tiny.cache.iterdir()} == {"downloads", "demo.lock"}


def test_two_processes_build_it_once(tiny: tiny_demo.Tiny) -> None:
    code = "demo.write_checkpoint = held(demo.write_checkpoint)\nprint(demo.demo_path(progress=True).name)"
    first = tiny_demo.child(tiny, code)
    assert first.stdout is not None and first.stdout.readline() == "building\n"
    second = tiny_demo.child(tiny, code)
    assert second.stderr is not None and any("waiting" in line for line in second.stderr)
    tiny.settings.with_name("go").touch()
    outputs = [process.communicate() for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert outputs[0][0].split() == outputs[1][0].split() == [demo.demo_path().name]


def test_too_little_disk_is_refused_before_writing(tiny: tiny_demo.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tiny.cache)._replace(free=50 * 2**20)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskSpaceError, match=r"50\.0 MiB are free"):
        demo.demo_path()
    assert {path.name for path in tiny.cache.iterdir()} == {"downloads", "demo.lock"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_said(tiny: tiny_demo.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    monkeypatch.setattr(gguf.LlamaGGUF, "save_tokenizer", full)
    with pytest.raises(DiskSpaceError, match="filled up"):
        demo.demo_path()
    assert {path.name for path in tiny.cache.iterdir()} == {"downloads", "demo.lock"}


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OffloadError, match="OFFLOAD_CACHE"):
        demo.demo_path()
