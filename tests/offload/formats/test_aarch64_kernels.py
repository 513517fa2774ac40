"""The kernels in C on an emulated aarch64 processor: the very bits that they give on this one with AVX2.

They are cross-compiled, and run by qemu-user in memory that it shares with this process. Debian's packages
gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user bring what that takes.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_calls import BYTES, Call, Memory, all_calls
from kernel_levels import kernels_of

from offload.formats.cpu import native

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
SOURCES = Path(native.__file__).parent
DRIVER = Path(__file__).with_name("aarch64_driver.c")
ADDRESS = 1 << 37  # where nothing else is, here or there

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-gcc"),
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64"),
    pytest.mark.skipif(native.library() is None, reason="the kernels are not built"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels and the program that calls them, compiled for aarch64."""
    program = tmp_path_factory.mktemp("aarch64") / "driver"
    options = ["-O3", "-std=gnu11", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-static"]
    subprocess.run([str(COMPILER), *options, *sorted(SOURCES.glob("*.c")), DRIVER, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def memory_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Memory that the driver sees, at ADDRESS."""
    path = tmp_path_factory.mktemp("memory") / "memory"
    path.write_bytes(bytes(BYTES))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    fixed = 0x100000 | mmap.MAP_SHARED  # MAP_FIXED_NOREPLACE
    with path.open("r+b") as file:
        assert libc.mmap(ADDRESS, BYTES, mmap.PROT_READ | mmap.PROT_WRITE, fixed, file.fileno(), 0) == ADDRESS
    return path


def here(calls: list[Call]) -> None:
    """The calls on this processor, with AVX2."""
    library = ctypes.CDLL(native.library()._name)  # type: ignore[union-attr]
    with kernels_of(native.AVX2):
        for call in calls:
            told: list[Any] = [ctypes.c_int64(value) for value in call.numbers]
            if call.float_at is not None:
                told.insert(call.float_at, ctypes.c_float(call.number))
            getattr(library, call.function)(*told)


def there(driver: Path, file: Path, processor: str, most: int, calls: list[Call]) -> int:
    """The calls on an emulated processor held to the level `most`; returns the level in use."""
    lines = [f"level_choose 0 {most} 0 0 0 0 0 0 0\n"]
    for call in calls:
        numbers = *call.numbers, *[0] * (8 - len(call.numbers))
        lines.append(f"{call.function} {call.number!r} {' '.join(map(str, numbers))}\n")
    command = [str(EMULATOR), "-cpu", processor, str(driver), str(file), str(ADDRESS), str(BYTES)]
    said = subprocess.run(command, input="".join(lines), capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in said[1:]] == [call.function for call in calls]
    return int(said[0].split()[1])


@pytest.mark.parametrize(
    ("processor", "most", "level"),
    [
        ("cortex-a57", native.NEON_BF16, native.NEON),
        ("max", native.NEON, native.NEON),
        ("max", native.NEON_BF16, native.NEON_BF16),
    ],
)
def test_an_aarch64_processor_gives_the_bits_of_avx2(
    driver: Path, memory_file: Path, processor: str, most: int, level: int
) -> None:
    memory = Memory(ADDRESS)
    calls = all_calls(memory)
    before = memory.all.copy()
    here(calls)
    expected = [[each.copy() for each in call.outputs] for call in calls]
    memory.all[:] = before
    assert there(driver, memory_file, processor, most, calls) == level
    other = [
        f"{call.function}, {call.case}: {np.sum(ours != theirs)} of {ours.size}"
        for call, wanted in zip(calls, expected, strict=True)
        for ours, theirs in zip(call.outputs, wanted, strict=True)
        if not np.array_equal(ours, theirs)
    ]
    assert not other
