"""The nested format on a CPU: torch's 4-bit kernel for few rows, weights dequantised once for many."""

from __future__ import annotations

import numpy as np
import torch

from offload.formats.cpu import has_int4_kernel
from offload.formats.fast import kernels

_11, _22 = np.uint64(0x1111111111111111), np.uint64(0x2222222222222222)
_33, _CC = np.uint64(0x3333333333333333), np.uint64(0xCCCCCCCCCCCCCCCC)
_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)
_PART = 4  # blocks of 64 rows unpacked at a time: so many stay in the processor's cache


def join(high: torch.Tensor, next_: torch.Tensor, out: torch.Tensor) -> None:
    """Two planes of 2 bits [N/64, K/2, 32] -> the 4 high bits `out` [N/64, K, 32]."""
    h, x, o = (plane.numpy().reshape(len(plane), -1).view(np.uint64) for plane in (high, next_, out))
    compiled = kernels()
    if compiled:
        compiled.join(h, x, o)
        return
    length = h.shape[1]
    rest = np.empty((_PART, length), np.uint64)
    for start in range(0, len(h), _PART):
        part = slice(start, start + _PART)
        first, second = o[part, :length], o[part, length:]
        t = rest[: len(first)]
        np.bitwise_and(h[part], _CC, out=first)
        np.bitwise_and(x[part], _33, out=t)
        first |= t
        np.bitwise_and(h[part], _33, out=second)
        second <<= _2
        np.right_shift(x[part], _2, out=t)
        t &= _33
        second |= t


def fill(high: torch.Tensor) -> torch.Tensor:
    """The plane of the 2 high bits [N/64, K/2, 32] -> 4 bits [N/64, K, 32], 10 or 01 behind them."""
    blocks, half, width = high.shape
    out = torch.empty(blocks, 2 * half, width, dtype=torch.uint8)
    h, o = (plane.numpy().reshape(blocks, -1).view(np.uint64) for plane in (high, out))
    compiled = kernels()
    if compiled:
        compiled.fill(h, o)
        return out
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
    x: torch.Tensor, groups: torch.Tensor, upper: torch.Tensor, low: torch.Tensor | None, n: int
) -> torch.Tensor:
    """x [m, k], groups [K/64, N, 2], upper and low [N/64, K, 32] -> [m, n]; without `low` the codes have 4 bits."""
    if x.dtype == torch.float16:  # slow on CPUs
        return multiply(x.float(), groups, upper, low, n).to(x.dtype)
    m, k = x.shape
    if has_int4_kernel() and k % 64 == 0 and m <= _most_rows(low is not None):
        y = _int4(x, groups, upper, low)
    else:
        if k % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        y = torch.mm(x, weights(groups, upper, low, x.dtype))
    return y if y.shape[1] == n else y[:, :n].contiguous()


def _most_rows(two: bool) -> int:
    """Up to how many rows of x the 4-bit kernel is the faster way, measured on Qwen3-30B-A3B's shapes."""
    return 16


def _int4(x: torch.Tensor, groups: torch.Tensor, upper: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """torch's kernel means zero + step * (code - 8)."""
    blocks, k, _ = upper.shape
    groups = groups.to(x.dtype)
    shape = (blocks * 64, k // 2)
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), upper.view(shape), 64, groups)
    if low is not None:  # step / 16 * (code - 7.5)
        steps = groups[..., 0]
        fine = torch.empty_like(groups)
        torch.mul(steps, 1 / 16, out=fine[..., 0])
        torch.mul(steps, 1 / 32, out=fine[..., 1])
        y += torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), low.view(shape), 64, fine)
    return y


def weights(groups: torch.Tensor, upper: torch.Tensor, low: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weights [K, N] in `dtype`."""
    blocks, k, _ = upper.shape
    step, zero = groups.float().permute(2, 0, 1).contiguous()
    compiled = kernels()
    if compiled and dtype == torch.bfloat16:
        out = torch.empty(k, blocks * 64, dtype=dtype)
        bits = out.view(torch.uint16).numpy()
        if low is None:
            compiled.weights4(upper.numpy(), step.numpy(), zero.numpy(), bits)
        else:
            step /= 16
            compiled.weights8(upper.numpy(), low.numpy(), step.numpy(), (zero - 7.5 * step).numpy(), bits)
        return out
    return _weights(step, zero, upper, low, dtype)


def _weights(
    step: torch.Tensor, zero: torch.Tensor, upper: torch.Tensor, low: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The same from step and zero [K/64, N], float32, with torch's own operations, one block of 64 rows at a time."""
    blocks, k, _ = upper.shape
    out = torch.empty(k, blocks * 64, dtype=dtype)
    codes = torch.empty(k, 64)
    for b in range(blocks):
        rows = slice(64 * b, 64 * b + 64)
        codes[:, :32] = upper[b] & 15
        codes[:, 32:] = upper[b] >> 4
        if low is None:
            codes -= 8
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
