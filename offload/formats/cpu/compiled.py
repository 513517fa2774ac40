"""The kernels behind `offload.formats.cpu.fast`.

Importing this imports Numba; each is compiled once and kept on disk.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

kernel: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
inlined: Any = numba.njit(inline="always", error_model="numpy")

_11, _22 = np.uint64(0x1111111111111111), np.uint64(0x2222222222222222)
_33, _CC = np.uint64(0x3333333333333333), np.uint64(0xCCCCCCCCCCCCCCCC)
_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)


@kernel
def join(high: U64, next_: U64, out: U64) -> None:
    """The nested format's planes [B, L] -> their 4 high bits [B, 2L]."""
    length = high.shape[1]
    for b in range(high.shape[0]):
        for i in range(length):
            out[b, i] = (high[b, i] & _CC) | (next_[b, i] & _33)
        for i in range(length):
            out[b, length + i] = ((high[b, i] & _33) << _2) | ((next_[b, i] >> _2) & _33)


@kernel
def fill(high: U64, out: U64) -> None:
    """The nested format's 2 high bits [B, L] -> 4 bits [B, 2L], the missing ones filled in."""
    length = high.shape[1]
    for b in range(high.shape[0]):
        for i in range(length):
            out[b, i] = (high[b, i] & _CC) + (_22 - ((high[b, i] >> _3) & _11))
        for i in range(length):
            out[b, length + i] = ((high[b, i] & _33) << _2) + (_22 - ((high[b, i] >> _1) & _11))


@inlined
def _bfloat16(value: Any) -> Any:
    """The bits of a float32 rounded to bfloat16, nearest even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
def weights4(upper: U8, step: F32, zero: F32, out: U16) -> None:
    """The nested format's 4-bit codes [N/64, K, 32], with step and zero [K/64, N], -> weights bfloat16 [K, N]."""
    for g in range(step.shape[0]):
        for b in range(upper.shape[0]):
            rows = slice(b * 64, b * 64 + 64)
            s, z = step[g, rows], zero[g, rows]
            for i in range(g * 64, min(g * 64 + 64, upper.shape[1])):
                u, o = upper[b, i], out[i, rows]
                for j in range(32):
                    o[j] = _bfloat16(np.float32(np.int32(u[j] & 15) - 8) * s[j] + z[j])
                    o[32 + j] = _bfloat16(np.float32(np.int32(u[j] >> 4) - 8) * s[32 + j] + z[32 + j])


@kernel
def weights8(upper: U8, low: U8, step: F32, zero: F32, out: U16) -> None:
    """The same for 8-bit codes in two halves; step is a sixteenth of the format's, zero the value of code 128."""
    for g in range(step.shape[0]):
        for b in range(upper.shape[0]):
            rows = slice(b * 64, b * 64 + 64)
            s, z = step[g, rows], zero[g, rows]
            for i in range(g * 64, min(g * 64 + 64, upper.shape[1])):
                u, v, o = upper[b, i], low[b, i], out[i, rows]
                for j in range(32):
                    first = (u[j] & 15) << 4 | v[j] & 15
                    second = u[j] & 240 | v[j] >> 4
                    o[j] = _bfloat16(np.float32(np.int32(first) - 128) * s[j] + z[j])
                    o[32 + j] = _bfloat16(np.float32(np.int32(second) - 128) * s[32 + j] + z[32 + j])
