"""Kernels that Numba compiles, where it is installed (`pip install offload[fast]`); everything works without them.

They take NumPy arrays, bfloat16 as its bits in uint16, and run without the GIL.
"""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled kernels, `offload.formats.cpu.compiled`; None without Numba, or without a place to keep them."""
    try:
        from offload.formats.cpu import compiled
    except (ImportError, RuntimeError):  # the latter where neither the package's nor the user's folder is writable
        return None
    return compiled
