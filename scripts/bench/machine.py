"""What benchmarks ran on: the machine, and how fast its memory is."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offload.system.cores import usable_cores
from offload.system.sizes import format_bytes

INSTRUCTIONS = {"amx_tile": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}
"""The kernels' levels, the best first, by the flag of /proc/cpuinfo."""


def default_threads() -> int:
    """The cores this process may use."""
    return usable_cores()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    about = {key.strip(): value.strip() for key, _, value in lines}
    flags = about.get("flags", "").split()
    return {
        "cpu": about.get("model name", platform.processor()),
        "instructions": next((level for flag, level in INSTRUCTIONS.items() if flag in flags), platform.machine()),
        "cores": default_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def machine_line() -> str:
    """The same in words."""
    about = machine()
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "accelerate"))
    memory = format_bytes(about["memory_bytes"])
    return f"on {about['cpu']} ({about['instructions']}), {about['cores']} cores, {memory} of RAM, {versions}"


def memory_bytes_per_s(threads: int) -> float:
    """How fast so many threads read this machine's memory."""
    import torch

    from offload.machine.memory import host_read_bytes_per_s

    return host_read_bytes_per_s(torch.zeros(1 << 29, dtype=torch.uint8), threads)
