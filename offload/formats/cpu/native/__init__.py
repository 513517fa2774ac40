"""Kernels in C, built when the package is installed where a C compiler is there; everything works without them.

`pool.c` shares a job out over threads, `nf4.c` multiplies by NF4 matrices, which `nf4_pack.c` brings into the order for
that, `nested.c` unpacks the nested format. They are called through ctypes, which gives up the GIL meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NONE, AVX2, AVX512 = range(3)
"""What `nf4_choose` and `nested_choose` say: which of their kernels this CPU runs."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they were not built, or for another kind of processor."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                lib = ctypes.CDLL(str(path))
                if not lib.kernels_are_there():
                    return None
            except (OSError, AttributeError):  # built for another system, or of an older version
                return None
            lib.nf4_products.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
            lib.nf4_pack.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
            lib.nf4_unpack.argtypes = lib.nf4_pack.argtypes
            lib.nested_join.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2]
            lib.nested_fill.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2]
            lib.nested_weights.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2, *[ctypes.c_int] * 2]
            for name in ("nf4_products", "nf4_pack", "nf4_unpack", "nested_join", "nested_fill", "nested_weights"):
                lib[name].restype = None
            return lib
    return None


@functools.cache
def nf4_kernel() -> int:
    """The best NF4 kernel that this CPU runs. Side effect: it is the one that runs from now on."""
    lib = library()
    return NONE if lib is None else int(lib.nf4_choose(AVX512))


@functools.cache
def nested_library() -> ctypes.CDLL | None:
    """The compiled functions, where this CPU runs those of the nested format: the best of them from now on."""
    lib = library()
    return lib if lib is not None and lib.nested_choose(AVX512) else None
