"""OFFLOAD_CPU holds our kernels and torch's libraries to a level of instructions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cache.errors import DeviceError
from offload.formats.cpu import features, native
from offload.system import instructions
from offload.system.instructions import LEVELS, asked

SHOW = (
    "import os, offload, torch; from offload.formats.cpu import features, native; "
    "print(features.level(), native.level(), torch.backends.cpu.get_cpu_capability(), "
    "os.environ.get('ONEDNN_MAX_CPU_ISA'), os.environ.get('MKL_ENABLE_INSTRUCTIONS'))"
)


def shown(monkeypatch: pytest.MonkeyPatch, level: str, **set_: str) -> list[str]:
    """The level, our kernels', torch's and what oneDNN and MKL are told, in a process that is held to `level`."""
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"OFFLOAD_CPU": level, **set_}.items():
        monkeypatch.setenv(name, value)
    return subprocess.check_output([sys.executable, "-c", SHOW], text=True).split()


@pytest.mark.skipif("avx2" not in LEVELS[: LEVELS.index(features.level()) + 1], reason="this CPU has no AVX2")
def test_a_level_holds_our_kernels_and_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = str(native.AVX2 if native.library() else native.NONE)
    assert shown(monkeypatch, "avx2") == ["avx2", ours, "AVX2", "AVX2", "AVX2"]
    assert shown(monkeypatch, "none") == ["none", str(native.NONE), "DEFAULT", "SSE41", "SSE4_2"]


def test_what_the_user_says_of_a_library_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, "none", ONEDNN_MAX_CPU_ISA="AVX")[3] == "AVX"


def test_a_level_above_the_processors_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFLOAD_CPU", raising=False)
    best = subprocess.check_output([sys.executable, "-c", SHOW], text=True).split()[0]
    assert shown(monkeypatch, "amx")[0] == best


def test_a_level_that_does_not_exist_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CPU", "avx3")
    with pytest.raises(DeviceError, match='OFFLOAD_CPU is "avx3": choose one of none, avx2'):
        asked()
    done = subprocess.run([sys.executable, "-m", "offload", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        'offload: error: OFFLOAD_CPU is "avx3": choose one of none, avx2, avx512, avx512-bf16, amx, or unset it'
    ]
    monkeypatch.setenv("OFFLOAD_CPU", "")
    assert asked() is None


def test_a_level_of_the_other_architecture_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "avx2" if "neon" in LEVELS else "neon"
    monkeypatch.setenv("OFFLOAD_CPU", other)
    with pytest.raises(DeviceError, match=f'OFFLOAD_CPU is "{other}": choose one of none'):
        asked()


@pytest.mark.parametrize(
    ("has", "held", "level"),
    [
        ({}, "", "none"),
        ({"neon": True, "dot": False}, "", "neon"),
        ({"neon": True, "dot": True, "bf16": False}, "", "neon-dotprod"),
        ({"neon": True, "dot": True, "bf16": True}, "", "neon-bf16"),
        ({"neon": True, "dot": True, "bf16": True}, "neon", "neon"),
    ],
)
def test_the_level_of_an_arm_processor(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], held: str, level: str
) -> None:
    monkeypatch.setattr(features, "LEVELS", instructions._ARM)
    monkeypatch.setattr(instructions, "LEVELS", instructions._ARM)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setenv("OFFLOAD_CPU", held)
    assert features.level.__wrapped__() == level
