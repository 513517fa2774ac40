"""The processor levels that engines are compared at: how llama.cpp is built for each, and how Python's are held to it.

`native` is whatever this processor has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from scripts.bench.machine import machine

NATIVE = "native"
VARIABLE = "OFFLOAD_CPU"
"""What tells our process which kernels it may use."""


@dataclass(frozen=True)
class Level:
    """llama.cpp's instructions beyond the level before, and the level's names in torch and its libraries."""

    ggml: tuple[str, ...]
    torch: str
    onednn: str
    mkl: str = "AVX512"


LEVELS = {
    "avx2": Level(("AVX2", "FMA", "F16C"), "avx2", "AVX2", mkl="AVX2"),
    "avx512": Level(("AVX512",), "avx512", "AVX512_CORE"),
    "avx512-bf16": Level(("AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"), "avx512", "AVX512_CORE_BF16"),
    "amx": Level(("AMX_TILE", "AMX_INT8", "AMX_BF16"), "avx512", "AVX512_CORE_AMX"),
}
"""By name, each with all of those before it."""


def cmake_arguments(level: str) -> list[str]:
    """What llama.cpp is configured with, to use this level and nothing above it."""
    if level == NATIVE:
        return ["-DGGML_NATIVE=ON"]
    names = list(LEVELS)
    used = [flag for name in names[: names.index(level) + 1] for flag in LEVELS[name].ggml]
    return ["-DGGML_NATIVE=OFF", *(f"-DGGML_{flag}=ON" for flag in used)]


def environment(level: str) -> dict[str, str]:
    """What a Python process is started with, so that neither our kernels nor torch's go beyond the level."""
    if level == NATIVE:
        return {}  # what the user set passes through
    own = LEVELS[level]
    libraries = {"ONEDNN_MAX_CPU_ISA": own.onednn, "MKL_ENABLE_INSTRUCTIONS": own.mkl}
    return {VARIABLE: level, "ATEN_CPU_CAPABILITY": own.torch, **libraries}


def described(level: str) -> str:
    """The level as a table has it: of `native`, what it is here."""
    if level != NATIVE:
        return level
    return f"{NATIVE} ({os.environ.get(VARIABLE) or machine()['instructions']})"
