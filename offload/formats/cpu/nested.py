"""The nested format on a CPU: torch's 4-bit kernel for few rows, weights dequantised once for many.

Planes are joined and weights dequantised in C where it was built, else by NumPy and torch, to the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.columns import FOUR_BITS, nested_products
from offload.formats.cpu.features import has_amx, has_int4_kernel
from offload.formats.cpu.native import vector_library
from offload.formats.cpu.plain import is_faster

_11, _22 = np.uint64(0x1111111111111111), np.uint64(0x2222222222222222)
_33, _CC = np.uint64(0x3333333333333333), np.uint64(0xCCCCCCCCCCCCCCCC)
_55, _AA = np.uint64(0x5555555555555555), np.uint64(0xAAAAAAAAAAAAAAAA)
_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)
Words = NDArray[np.uint64]
_PART = 4  # blocks of 64 rows unpacked at a time: so many stay in the processor's cache


def join(high: torch.Tensor, third: torch.Tensor, fourth: torch.Tensor | None, out: torch.Tensor) -> None:
    """The planes of the 2 high bits [N/64, K/2, 32] and of the two behind them -> all 4, `out` [N/64, K, 32].

    Without `fourth` that bit is 0.
    """
    native = vector_library()
    if native:
        fourth_at = None if fourth is None else fourth.data_ptr()
        length, quarter = high[0].numel(), third[0].numel()
        native.nested_upper(high.data_ptr(), third.data_ptr(), fourth_at, out.data_ptr(), len(high), length, quarter)
        return
    h, o = _words(high), _words(out)
    length = h.shape[1]
    for start in range(0, len(h), _PART):
        part = slice(start, start + _PART)
        first, second = o[part, :length], o[part, length:]
        t = _next(length, _words(third)[part], None if fourth is None else _words(fourth)[part])
        np.bitwise_and(h[part], _CC, out=first)
        first |= t & _33
        np.bitwise_and(h[part], _33, out=second)
        second <<= _2
        t >>= _2
        t &= _33
        second |= t


def _words(plane: torch.Tensor) -> Words:
    return plane.numpy().reshape(len(plane), -1).view(np.uint64)


def _next(length: int, third: Words, fourth: Words | None) -> Words:
    """The two bits behind the high ones [.., length], as they lie in `next` of `offload.formats.nested`."""
    quarter = third.shape[1]
    bits = np.empty((len(third), length), np.uint64)
    np.bitwise_and(third, _AA, out=bits[:, :quarter])
    np.left_shift(third[:, : length - quarter] & _55, _1, out=bits[:, quarter:])
    if fourth is not None:
        bits[:, :quarter] |= fourth & _55
        bits[:, quarter:] |= fourth[:, : length - quarter] >> _1 & _55
    return bits


def fill(high: torch.Tensor) -> torch.Tensor:
    """The plane of the 2 high bits [N/64, K/2, 32] -> 4 bits [N/64, K, 32], 10 or 01 behind them."""
    blocks, half, width = high.shape
    out = torch.empty(blocks, 2 * half, width, dtype=torch.uint8, device="cpu")
    native = vector_library()
    if native:
        native.nested_fill(high.data_ptr(), out.data_ptr(), blocks, half * width)
        return out
    h, o = (plane.numpy().reshape(blocks, -1).view(np.uint64) for plane in (high, out))
    length = h.shape[1]
    rest = np.empty((_PART, length), np.uint64)
    for start in range(0, blocks, _PART):
        part = slice(start, start + _PART)
        first, second = o[part, :length], o[part, length:]
        t = rest[: len(first)]
        np.bitwise_and(h[part], _CC, out=first)
        np.right_shift(h[part], _3, out=t)  # its highest bit: 1 in the upper half of the range
        t &= _11
        first -= t
        first += _22
        np.bitwise_and(h[part], _33, out=second)
        second <<= _2
        np.right_shift(h[part], _1, out=t)
        t &= _11
        second -= t
        second += _22
    return out


def multiply(
    x: torch.Tensor,
    groups: torch.Tensor,
    upper: torch.Tensor,
    low: torch.Tensor | None,
    n: int,
    middle: float = FOUR_BITS,
) -> torch.Tensor:
    """x [m, k], groups [K/64, N, 2], upper and low [N/64, K, 32] -> [m, n]; without `low` the codes have 4 bits, and
    `middle` is the one that means zero."""
    if is_faster():
        y = nested_products(x, [(groups, upper, low)], middle)
        return y if y.shape[1] == n else y[:, :n].contiguous()
    if x.dtype == torch.float16:  # slow on CPUs
        return multiply(x.float(), groups, upper, low, n, middle).to(x.dtype)
    m, k = x.shape
    if middle == FOUR_BITS and has_int4_kernel() and k % 64 == 0 and m <= _most_rows(low is not None):
        y = _int4(x, groups, upper, low)
    else:
        if k % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        y = torch.mm(x, weights(groups, upper, low, x.dtype, middle))
    return y if y.shape[1] == n else y[:, :n].contiguous()


def _most_rows(two: bool) -> int:
    """Up to how many rows of x the 4-bit kernel, called once or for two halves, is the faster way.

    Measured on Qwen3-30B-A3B's shapes: with AMX where weights are dequantised by torch, without it where they are in C.
    bfloat16 products take about twice as long without AMX.
    """
    most = (16 if has_amx() else 24) if vector_library() else (72 if has_amx() else 96)
    return most // 2 if two else most


def _int4(x: torch.Tensor, groups: torch.Tensor, upper: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """torch's kernel means zero + step * (code - 8)."""
    blocks, k, _ = upper.shape
    shape = (blocks * 64, k // 2)
    x = x.contiguous()
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, upper.view(shape), 64, groups.to(x.dtype))
    if low is not None:  # step / 16 * (code - 7.5)
        y += torch.ops.aten._weight_int4pack_mm_for_cpu(x, low.view(shape), 64, _fine(groups, x.dtype))
    return y


def _fine(groups: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """step and zero of the 4 low bits [K/64, N, 2]: a sixteenth of the step, half of that as the value of code 8.

    Both are exact in bfloat16. Whole words are several times as fast as every other bfloat16.
    """
    step = (groups.view(torch.int32) << 16).view(torch.float32)  # its bits are the lower half of a word
    if dtype == torch.float32:
        return torch.cat((step / 16, step / 32), dim=2)
    lower = (step * (1 / 16)).view(torch.int32).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    upper = (step * (1 / 32)).view(torch.int32).bitwise_and_(-0x10000)
    return lower.bitwise_or_(upper).view(torch.bfloat16).view(groups.shape)


def weights(
    groups: torch.Tensor,
    upper: torch.Tensor,
    low: torch.Tensor | None,
    dtype: torch.dtype,
    middle: float = FOUR_BITS,
) -> torch.Tensor:
    """The weights [K, N] in `dtype`; without `low` the code `middle` means zero."""
    blocks, k, _ = upper.shape
    out = torch.empty(k, blocks * 64, dtype=dtype, device="cpu")
    native = vector_library()
    if native and dtype in (torch.bfloat16, torch.float32):
        codes_at, low_at = upper.data_ptr(), None if low is None else low.data_ptr()
        n, wide, threads = blocks * 64, dtype == torch.float32, own_threads.count()
        native.nested_weights(groups.data_ptr(), codes_at, low_at, out.data_ptr(), n, k, wide, middle, threads)
        return out
    step, zero = groups.float().permute(2, 0, 1).contiguous()
    codes = torch.empty(k, 64, device="cpu")
    for b in range(blocks):  # one block of 64 rows at a time
        rows = slice(64 * b, 64 * b + 64)
        codes[:, :32] = upper[b] & 15
        codes[:, 32:] = upper[b] >> 4
        if low is None:
            codes -= middle
        else:
            codes -= 8 + 7.5 / 16
            codes[:, :32].add_(low[b] & 15, alpha=1 / 16)
            codes[:, 32:].add_(low[b] >> 4, alpha=1 / 16)
        whole = k // 64 * 64
        for start, end in ((0, whole), (whole, k)):
            if start < end:
                part = codes[start:end].view(-1, min(64, end - start), 64)
                g = slice(start // 64, start // 64 + len(part))
                part.mul_(step[g, None, rows]).add_(zero[g, None, rows])
        out[:, rows] = codes
    return out
