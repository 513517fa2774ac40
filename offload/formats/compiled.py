"""The kernels behind `offload.formats.fast`. Importing this imports Numba; each is compiled once and kept on disk."""

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

_0F, _F0 = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0)
_11, _22 = np.uint64(0x1111111111111111), np.uint64(0x2222222222222222)
_33, _CC = np.uint64(0x3333333333333333), np.uint64(0xCCCCCCCCCCCCCCCC)
_EVEN1, _EVEN2, _EVEN4 = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00000000FFFFFFFF)
_1, _2, _3, _4, _8, _16, _32 = (np.uint64(i) for i in (1, 2, 3, 4, 8, 16, 32))


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


@inlined
def _transpose(x0: Any, x1: Any, x2: Any, x3: Any, x4: Any, x5: Any, x6: Any, x7: Any) -> Any:
    """8 x 8 bytes, a row in each number, transposed."""
    y0, y1 = (x0 & _EVEN1) | ((x1 & _EVEN1) << _8), ((x0 >> _8) & _EVEN1) | (x1 & ~_EVEN1)
    y2, y3 = (x2 & _EVEN1) | ((x3 & _EVEN1) << _8), ((x2 >> _8) & _EVEN1) | (x3 & ~_EVEN1)
    y4, y5 = (x4 & _EVEN1) | ((x5 & _EVEN1) << _8), ((x4 >> _8) & _EVEN1) | (x5 & ~_EVEN1)
    y6, y7 = (x6 & _EVEN1) | ((x7 & _EVEN1) << _8), ((x6 >> _8) & _EVEN1) | (x7 & ~_EVEN1)
    z0, z2 = (y0 & _EVEN2) | ((y2 & _EVEN2) << _16), ((y0 >> _16) & _EVEN2) | (y2 & ~_EVEN2)
    z1, z3 = (y1 & _EVEN2) | ((y3 & _EVEN2) << _16), ((y1 >> _16) & _EVEN2) | (y3 & ~_EVEN2)
    z4, z6 = (y4 & _EVEN2) | ((y6 & _EVEN2) << _16), ((y4 >> _16) & _EVEN2) | (y6 & ~_EVEN2)
    z5, z7 = (y5 & _EVEN2) | ((y7 & _EVEN2) << _16), ((y5 >> _16) & _EVEN2) | (y7 & ~_EVEN2)
    x0, x4 = (z0 & _EVEN4) | (z4 << _32), (z0 >> _32) | (z4 & ~_EVEN4)
    x1, x5 = (z1 & _EVEN4) | (z5 << _32), (z1 >> _32) | (z5 & ~_EVEN4)
    x2, x6 = (z2 & _EVEN4) | (z6 << _32), (z2 >> _32) | (z6 & ~_EVEN4)
    x3, x7 = (z3 & _EVEN4) | (z7 << _32), (z3 >> _32) | (z7 & ~_EVEN4)
    return x0, x1, x2, x3, x4, x5, x6, x7


@inlined
def _exchange(a: Any, b: Any) -> Any:
    """Nibbles: the high ones of both, the low ones of both; `a` has the even inputs of a row in its high nibbles."""
    return ((a >> _4) & _0F) | (b & _F0), (a & _0F) | ((b & _0F) << _4)


@kernel
def nf4_pack(codes: U64, out: U64) -> None:
    """Canonical NF4 codes [N/32, 32, K/16] -> bitsandbytes' layout for CPUs [N/32, K/2, 4]; see `nf4_cpu`."""
    for b in range(codes.shape[0]):
        c, o = codes[b], out[b]
        for q in range(c.shape[1]):
            p = 8 * q
            for g in range(4):
                r = 4 * g
                x0, x1 = _exchange(c[r, q], c[r + 16, q])
                x2, x3 = _exchange(c[r + 1, q], c[r + 17, q])
                x4, x5 = _exchange(c[r + 2, q], c[r + 18, q])
                x6, x7 = _exchange(c[r + 3, q], c[r + 19, q])
                x0, x1, x2, x3, x4, x5, x6, x7 = _transpose(x0, x1, x2, x3, x4, x5, x6, x7)
                o[p, g], o[p + 1, g], o[p + 2, g], o[p + 3, g] = x0, x1, x2, x3
                o[p + 4, g], o[p + 5, g], o[p + 6, g], o[p + 7, g] = x4, x5, x6, x7


@kernel
def nf4_unpack(codes: U64, out: U64) -> None:
    """The inverse: [N/32, K/2, 4] -> [N/32, 32, K/16]."""
    for b in range(codes.shape[0]):
        c, o = codes[b], out[b]
        for q in range(o.shape[1]):
            p = 8 * q
            for g in range(4):
                r = 4 * g
                x0, x1, x2, x3, x4, x5, x6, x7 = _transpose(
                    c[p, g], c[p + 1, g], c[p + 2, g], c[p + 3, g], c[p + 4, g], c[p + 5, g], c[p + 6, g], c[p + 7, g]
                )
                o[r, q], o[r + 16, q] = ((x0 & _0F) << _4) | (x1 & _0F), (x0 & _F0) | ((x1 >> _4) & _0F)
                o[r + 1, q], o[r + 17, q] = ((x2 & _0F) << _4) | (x3 & _0F), (x2 & _F0) | ((x3 >> _4) & _0F)
                o[r + 2, q], o[r + 18, q] = ((x4 & _0F) << _4) | (x5 & _0F), (x4 & _F0) | ((x5 >> _4) & _0F)
                o[r + 3, q], o[r + 19, q] = ((x6 & _0F) << _4) | (x7 & _0F), (x6 & _F0) | ((x7 >> _4) & _0F)
