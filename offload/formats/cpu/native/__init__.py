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


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "nf4_products": (_POINTER, _INT, _POINTER, _INT),
    "nf4_pack": (_POINTER, _POINTER, _LONG, _LONG),
    "nf4_unpack": (_POINTER, _POINTER, _LONG, _LONG),
    "nested_join": (_POINTER, _POINTER, _POINTER, _LONG, _LONG),
    "nested_fill": (_POINTER, _POINTER, _LONG, _LONG),
    "nested_weights": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they were not built, or for another kind of processor."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                lib = ctypes.CDLL(str(path))
                for name, arguments in _ARGUMENTS.items():
                    function = getattr(lib, name)
                    function.argtypes, function.restype = arguments, None
                return lib if lib.kernels_are_there() else None
            except (OSError, AttributeError):  # built for another system, or of an older version
                return None
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
