"""Kernels that Numba compiles, where it is installed (`pip install offload[fast]`); everything works without them.

They take NumPy arrays, bfloat16 as its bits in uint16, and run without the GIL.
"""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled kernels, `offload.formats.compiled`; None without Numba."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return None
    from offload.formats import compiled

    return compiled
