"""What this process uses and what this machine has free, in bytes, on every platform."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil

from offload.system import cgroups

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
_LARGE_BYTES = 8 * 2**20
_KEPT_BYTES = 64 * 2**20


def return_large_blocks() -> None:
    """From now on, memory of 8 MiB and more that is freed goes back to the system at once. Nothing outside glibc.

    A prompt's activations grow with every chunk and find no room in the holes that the chunk before left: 2,048 tokens
    of gpt-oss-20b's shape left half a gigabyte of them, which no plan has. Of smaller blocks 64 MiB are kept for
    the next ones, as each new page costs a microsecond or two. Side effect: for the whole process, and it cannot be
    undone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def resident_bytes() -> int:
    """Resident memory of this process now (RSS)."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most resident memory this process ever had: what `/usr/bin/time -v` reports."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def restart_peak() -> None:
    """Measure `peak_resident_bytes` of this process from here on, where the system can (Linux)."""
    file = Path("/proc/self/clear_refs")
    with contextlib.suppress(OSError):  # some containers forbid it
        if file.exists():
            file.write_text("5")


def available_bytes() -> int:
    """Memory this process could still take without swapping, its control groups' limits included."""
    available = int(psutil.virtual_memory().available)
    left = cgroups.free_bytes(resident_bytes())
    return available if left is None else min(available, left)
