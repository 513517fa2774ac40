"""Kernels in C, built when the package is installed where a C compiler is there; everything works without them.

`level.c` says which instructions they use. `pool.c` shares a job out over threads, and may let a worker lead a call.
`plain.c` multiplies by plain and 8-bit matrices, `columns.c` by plain ones that lie the other way round and by nested
ones, and `nf4.c` by NF4 ones, with `nf4_int16.c` or `nf4_int8.c`. `plain_experts.c` and `nf4_experts.c` compute whole
experts. `token_heads.c` is what a token's attention begins with, and `token_sublayer.c` all that comes before a layer's
experts, the router included, with NF4 or bfloat16 matrices (`one_row.c`). `nf4_pack.c` brings matrices into the order
for that, and `nested.c` unpacks the nested format. `attention.c` is one token's attention, `routing.c` its router,
`norm.c` RMSNorm, `combine.c` the sum of experts' outputs. Headers `*_rows.h` are compiled once for each width of
vectors, which `simd_*.h` describe: for AVX2 and AVX-512, or for NEON, whose vectors are as wide as AVX2's, so that it
gives the same bits. They compile for no other processor. All are called through ctypes, which gives up the GIL
meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from offload.formats.cpu import features
from offload.system.instructions import LEVELS

NONE, AVX2, AVX512, AVX512_BF16 = range(4)
NEON, NEON_DOTPROD, NEON_BF16 = range(1, 4)
BF16 = AVX512_BF16  # and NEON_BF16: such processors have instructions for bfloat16
"""What `level` says: which kernels run. Each architecture's levels are counted by themselves."""

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "plain_products": (_POINTER, _INT, _INT, _INT, _INT, _POINTER, _INT),
    "columns_products": (_POINTER, _INT, _INT, _INT, _INT, _POINTER, _INT),
    "nf4_products": (_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _INT),
    "nf4_round": (_POINTER, _LONG, _LONG, _INT, _POINTER, _INT),
    "nf4_experts": (ctypes.c_char_p, _INT),
    "attention": (ctypes.c_char_p, _INT),
    "rms_norm": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, ctypes.c_float, _INT, _INT),
    "plain_experts": (ctypes.c_char_p, _INT),
    "pool_begin": (_POINTER, ctypes.c_char_p, _INT),
    "pool_wait": (),
    "combine": (_POINTER, _INT),
    "token_heads": (ctypes.c_char_p, _INT),
    "token_sublayer": (ctypes.c_char_p, _INT),
    "route": (_POINTER, _INT),
    "nf4_pack": (_POINTER, _POINTER, _LONG, _LONG),
    "nf4_unpack": (_POINTER, _POINTER, _LONG, _LONG),
    "nested_upper": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG),
    "nested_fill": (_POINTER, _POINTER, _LONG, _LONG),
    "nested_weights": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, ctypes.c_float, _INT),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, held to the level in use; None where they were not built."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                lib = ctypes.CDLL(str(path))
                for name, arguments in _ARGUMENTS.items():
                    function = getattr(lib, name)
                    function.argtypes, function.restype = arguments, None
                lib.pool_lasted_ns.restype = _LONG
                lib.level_choose(LEVELS.index(features.level()))
                return lib
            except (OSError, AttributeError):  # built for another system, or of an older version
                return None
    return None


@functools.cache
def _in_use() -> ctypes.c_int:
    lib = library()
    return ctypes.c_int(NONE) if lib is None else ctypes.c_int.in_dll(lib, "level_in_use")


def level() -> int:
    """Which of our kernels run on this CPU: NONE, or the best of them."""
    return _in_use().value


def vector_library() -> ctypes.CDLL | None:
    """The compiled functions, where any of our kernels runs."""
    return library() if level() else None
