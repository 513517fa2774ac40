"""What the comparison with other engines says of levels, read-ahead and residency."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.storage import read_ahead_kb
from scripts.peers import build_llama
from scripts.peers.engines import Files, Pythons, Settings
from scripts.peers.levels import LEVELS, cmake_arguments, described, environment
from scripts.peers.tables import markdown
from tests.scripts.small import ROOT

CASE = {
    "shape": "olmoe",
    "layers": 2,
    "group": "4.5 bits",
    "level": "avx2",
    "resident": True,
    "model_bytes": 1 << 30,
    "memory_bytes": None,
    "trace": None,
    "decode_tokens_per_s": {"ours-nf4": 20.0, "llama.cpp-q4_0": 40.0},
    "prompt_tokens_per_s": {"64": {"ours-nf4": 90.0, "llama.cpp-q4_0": 60.0}},
    "same_choices": {"ours-nf4": [3, 4], "llama.cpp-q4_0": [2, 4]},
    "unable": {},
    "peak_bytes": {"ours-nf4": 2 << 30, "llama.cpp-q4_0": None},
    "resident_tokens_per_s": 10.0,
    "ours": None,
}


def test_each_level_has_the_instructions_below_it() -> None:
    low = ["-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON"]
    assert cmake_arguments("avx2") == low
    assert cmake_arguments("avx512") == [*low, "-DGGML_AVX512=ON"]
    assert cmake_arguments("native") == ["-DGGML_NATIVE=ON"]
    for level in LEVELS:
        assert environment(level)["OFFLOAD_CPU"] == described(level) == level
    assert environment("avx2")["ATEN_CPU_CAPABILITY"] == "avx2"
    assert environment("native") == {}


def test_native_is_described_by_what_the_user_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CPU", "avx512")
    assert described("native") == "native (avx512)"


def test_engines_keep_to_the_level_and_to_residency(tmp_path: Path) -> None:
    files = Files("olmoe", 2, tmp_path)
    here, settings = Path("python"), Settings(2, 300, None, ours={"activations": "int8"})
    for engine in ("ours-nf4", "llama.cpp-q4_0"):
        command = files.command(engine, Pythons(here, here, "avx2"), settings)
        assert command[:2] == ["env", "OFFLOAD_CPU=avx2"]
        assert not any("OFFLOAD_CPU" in part for part in files.command(engine, Pythons(here, here), settings))
    llama = files.command("llama.cpp-q4_0", Pythons(here, here), settings)
    assert "--resident" in llama and llama[llama.index("--context") + 1] == "512"
    assert "--resident" not in files.command("llama.cpp-q4_0", Pythons(here, here), Settings(2, 300, 1 << 30))
    assert '"activations": "int8"' in files.command("ours-nf4", Pythons(here, here), settings)[-1]


def test_the_recipe_for_llama_says_what_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_llama.main(["avx2", "somewhere", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and "-m venv somewhere" in said[0]
    assert "GGML_NATIVE=OFF -DGGML_AVX2=ON" in said[2] and "--no-binary llama-cpp-python" in said[2]


def test_the_read_ahead_of_a_disk_and_of_a_partition(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    disk, here = tmp_path / "disk", tmp_path / "dev" / f"{os.major(number)}:{os.minor(number)}"
    here.parent.mkdir()
    assert read_ahead_kb(tmp_path, here.parent) is None
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "read_ahead_kb").write_text("128\n")
    here.symlink_to(disk)
    assert read_ahead_kb(tmp_path, here.parent) == 128
    here.unlink()
    (disk / "partition").mkdir()
    here.symlink_to(disk / "partition")
    assert read_ahead_kb(tmp_path, here.parent) == 128


def test_tables_have_levels_and_ratios() -> None:
    within: dict[str, Any] = {**CASE, "resident": False, "memory_bytes": 1 << 29}
    nobody = {"ours-nf4": 5.0, "llama.cpp-q4_0": None}
    alone = {**CASE, "level": "native (AVX512)", "decode_tokens_per_s": nobody, "unable": {"llama.cpp-q4_0": "none"}}
    said = markdown([CASE, alone, within], "on a machine").splitlines()
    assert said[0] == "On a machine."
    assert [line for line in said if line.startswith("#")] == ["### 4.5 bits, everything in RAM", "### 4.5 bits"]
    assert "| olmoe | 2 | 1.00 GiB | all | avx2 | 20.0 | 40.0 | 0.50 | 10.0 |" in said
    assert "| olmoe | 2 | 1.00 GiB | all | native (AVX512) | 5.00 | - (1) | - | 10.0 |" in said
    assert "| olmoe | 2 | 1.00 GiB | all | avx2 | 64 | 90.0 | 60.0 | 1.50 |" in said
    assert "| olmoe | 2 | 1.00 GiB | all | avx2 | 3 of 4, 2.00 GiB | 2 of 4 |" in said
    assert "| olmoe | 2 | 1.00 GiB | 512.0 MiB | avx2 | 20.0 | 40.0 | 0.50 | 10.0 |" in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--fractions", "none"), "--fractions none leaves --resident"),
        (("--llama-python", "sse=python"), "sse is none of avx2, avx512, avx512-bf16, amx, native"),
        (("--ours", "activations"), "write name=value"),
    ],
)
def test_arguments_that_make_no_sense(arguments: tuple[str, ...], why: str) -> None:
    command = [sys.executable, ROOT / "scripts/peers/bench.py", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and why in done.stderr
