"""Which of the processor's instructions are used: all of them, or fewer where OFFLOAD_CPU names a level.

So one machine tests what runs on older ones. The libraries that compute beside our own kernels are held to it, too, as
far as each can be.
"""

from __future__ import annotations

import os
import platform

from cache.errors import DeviceError

VARIABLE = "OFFLOAD_CPU"
_X86 = ("none", "avx2", "avx512", "avx512-bf16", "amx")
_ARM = ("none", "neon", "neon-dotprod", "neon-bf16")
LEVELS = _ARM if platform.machine() in ("aarch64", "arm64") else _X86
"""Those of this machine's architecture. Each has all that those before it have. "none" is any processor: none of our
kernels runs."""

_LIBRARIES = {
    "none": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512-bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "neon": {"ATEN_CPU_CAPABILITY": "default"},
    "neon-dotprod": {"ATEN_CPU_CAPABILITY": "default"},
    "neon-bf16": {"ATEN_CPU_CAPABILITY": "default"},
}
"""What torch's own kernels, oneDNN and MKL read, once, when each first computes. On ARM torch's have SVE without it."""


def asked() -> str | None:
    """The level that OFFLOAD_CPU names, if it is set. Raises DeviceError for one that does not exist."""
    level = os.environ.get(VARIABLE) or None
    if level is not None and level not in LEVELS:
        raise DeviceError(f'{VARIABLE} is "{level}": choose one of {", ".join(LEVELS)}, or unset it')
    return level


def hold_libraries() -> None:
    """Hold torch's libraries to the level asked for; before they first compute. What the user has set stays."""
    for name, value in _LIBRARIES.get(os.environ.get(VARIABLE, ""), {}).items():
        os.environ.setdefault(name, value)
