"""NF4 on CPUs: the layout that our kernel and bitsandbytes' want, the way back, and our kernel's call.

The kernels want 32 rows side by side. For each 32 rows and each pair of inputs 2p and 2p + 1 there are 32 bytes, two
for each row r < 16: row r's codes in the low nibbles, those of row r + 16 in the high ones, the even input's in the
first byte. `_convert_weight_packed_for_cpu` makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from offload.formats.cpu.jobs import multiply
from offload.formats.cpu.native import library

_PART = 4  # blocks of 32 rows moved at a time: so many stay in the processor's cache


def pack_codes(codes: torch.Tensor, out: torch.Tensor) -> None:
    """codes [n*k/2] in canonical order -> out [n, k/2], n a multiple of 32, k of 64."""
    n, half = out.shape
    native = library()
    if native:
        native.nf4_pack(codes.data_ptr(), out.data_ptr(), n, half)
        return
    canonical = codes.numpy().reshape(n // 32, 2, 16, half)
    pairs = out.numpy().reshape(n // 32, half, 16, 2).view("<u2")[..., 0]
    for start in range(0, n // 32, _PART):
        part = slice(start, start + _PART)
        first, second = (canonical[part, i].astype("<u2") for i in range(2))
        even = first >> 4 | second & 0xF0
        odd = first << 8 & 0x0F00 | second << 12
        pairs[part] = (even | odd).transpose(0, 2, 1)


def products(
    x: torch.Tensor,
    matrices: Sequence[Mapping[str, torch.Tensor]],
    n: int,
    levels: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """bfloat16 x with packed matrices [n, k] -> bfloat16. Of one matrix: x [m, k] -> [m, n]. Of several, a row of each:
    x [1, k], or [len(matrices), k] -> [len(matrices), n]. What one matrix gives is written to `out` [m, n], if there is
    one, whose rows may lie apart.

    Computed by `offload.formats.cpu.native` on `own_threads.count()` threads. A row's bits depend neither on those nor
    on the rows beside it. `levels` are the 16 values as integers, and x is rounded to such, too, in blocks of 64
    inputs: int16 in 4096ths, to which x loses nothing that bfloat16 could show, or int8 in 127ths.
    """
    places = [(fields["codes"].data_ptr(), fields["absmax"].data_ptr()) for fields in matrices]
    lib = library()
    assert lib is not None
    told = 8 * levels.itemsize, levels.data_ptr()
    step = n if out is None else out.stride(0)
    return multiply(lib.nf4_products, x, places, n, x.shape[1], *told, more=(step,), out=out)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse: [n, k/2] -> canonical codes [n*k/2]."""
    n, half = packed.shape
    out = torch.empty(n * half, dtype=torch.uint8, device="cpu")
    native = library()
    if native:
        native.nf4_unpack(packed.data_ptr(), out.data_ptr(), n, half)
        return out
    canonical = out.numpy().reshape(n // 32, 2, 16, half)
    pairs = packed.numpy().reshape(n // 32, half, 16, 2).view("<u2")[..., 0]
    for start in range(0, n // 32, _PART):
        part = slice(start, start + _PART)
        both = np.ascontiguousarray(pairs[part].transpose(0, 2, 1))
        canonical[part, 0] = both << 4 & 0xF0 | both >> 8 & 0x0F
        canonical[part, 1] = both & 0xF0 | both >> 12
    return out
