"""NF4 on CPUs with AVX512-BF16: bitsandbytes' own kernel, the layout that it wants, and the way back.

The kernel wants 32 rows side by side. For each 32 rows and each pair of inputs 2p and 2p + 1 there are 32 bytes, two
for each row r < 16: row r's codes in the low nibbles, those of row r + 16 in the high ones, the even input's in the
first byte. `_convert_weight_packed_for_cpu` makes the same bytes.
"""

from __future__ import annotations

import numpy as np
import torch

from offload.formats.fast import kernels

_PART = 4  # blocks of 32 rows moved at a time: so many stay in the processor's cache


def pack_codes(codes: torch.Tensor, out: torch.Tensor) -> None:
    """codes [n*k/2] in canonical order -> out [n, k/2], n a multiple of 32, k of 64."""
    n, half = out.shape
    compiled = kernels()
    if compiled:
        compiled.nf4_pack(
            codes.numpy().view(np.uint64).reshape(n // 32, 32, half // 8),
            out.numpy().view(np.uint64).reshape(n // 32, half, 4),
        )
        return
    canonical = codes.numpy().reshape(n // 32, 2, 16, half)
    pairs = out.numpy().reshape(n // 32, half, 16, 2).view("<u2")[..., 0]
    for start in range(0, n // 32, _PART):
        part = slice(start, start + _PART)
        first, second = (canonical[part, i].astype("<u2") for i in range(2))
        even = first >> 4 | second & 0xF0
        odd = first << 8 & 0x0F00 | second << 12
        pairs[part] = (even | odd).transpose(0, 2, 1)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse: [n, k/2] -> canonical codes [n*k/2]."""
    n, half = packed.shape
    out = torch.empty(n * half, dtype=torch.uint8)
    compiled = kernels()
    if compiled:
        compiled.nf4_unpack(
            packed.numpy().view(np.uint64).reshape(n // 32, half, 4),
            out.numpy().view(np.uint64).reshape(n // 32, 32, half // 8),
        )
        return out
    canonical = out.numpy().reshape(n // 32, 2, 16, half)
    pairs = packed.numpy().reshape(n // 32, half, 16, 2).view("<u2")[..., 0]
    for start in range(0, n // 32, _PART):
        part = slice(start, start + _PART)
        both = np.ascontiguousarray(pairs[part].transpose(0, 2, 1))
        canonical[part, 0] = both << 4 & 0xF0 | both >> 8 & 0x0F
        canonical[part, 1] = both & 0xF0 | both >> 12
    return out
