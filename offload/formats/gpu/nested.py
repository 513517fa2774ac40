"""The nested format on CUDA: a Triton kernel that multiplies straight from the planes, at any level.

Unverified: it has run in Triton's interpreter on a CPU, and was compiled for a GPU, but has not run on one. Importing
this imports Triton, whose compiler reads annotations, too, and knows only Triton's own names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from offload.formats.base import Fields

ROWS = 32  # outputs of one program: half a block of 64, so that each byte of a plane gives one nibble
ENTRIES = 32  # inputs of each half of K that are read at a time; half a group


@triton.jit
def _linear(
    x: tl.tensor,
    groups: tl.tensor,
    high: tl.tensor,
    third_bits: tl.tensor,
    fourth_bits: tl.tensor,
    low: tl.tensor,
    y: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    padded_n: tl.tensor,
    half: tl.tensor,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """One program: TOKENS rows of x with 32 outputs, upper (0) or lower (1) half of a block of 64."""
    part = tl.program_id(0)
    block, nibble = part // 2, part % 2
    shift = nibble * 4
    quarter = (half + 1) // 2
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    j = tl.arange(0, ROWS)
    row = part * ROWS + j
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for start in range(0, half, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        inside = i < half
        at = (block * half + i[:, None]) * 32 + j[None, :]
        h = tl.load(high + at, mask=inside[:, None], other=0).to(tl.int32) >> shift
        if BITS > 2:
            late = i >= quarter  # inputs whose bits lie beside those of an earlier one
            bit = (block * quarter + tl.where(late, i - quarter, i)[:, None]) * 32 + j[None, :]
            r = tl.load(third_bits + bit, mask=inside[:, None], other=0).to(tl.int32) >> shift
            r = tl.where(late[:, None], r << 1, r) & 10
            if BITS > 3:
                f = tl.load(fourth_bits + bit, mask=inside[:, None], other=0).to(tl.int32) >> shift
                r |= tl.where(late[:, None], f >> 1, f) & 5
        for side in tl.static_range(2):  # inputs of the first and of the second half of K
            column = i + side * half
            code = (h & 0xC) if side == 0 else ((h & 3) << 2)
            if BITS == 2:
                code += 2 - (code >> 3)
            else:
                code |= (r & 3) if side == 0 else ((r >> 2) & 3)
            value = code.to(tl.float32) - (7.5 if BITS == 3 else 8)
            if BITS == 8:
                place = (block * 2 * half + column[:, None]) * 32 + j[None, :]
                fine = tl.load(low + place, mask=inside[:, None], other=0).to(tl.int32) >> shift
                value += ((fine & 15).to(tl.float32) - 7.5) / 16
            group = ((column // 64)[:, None] * padded_n + row[None, :]) * 2
            step = tl.load(groups + group, mask=inside[:, None], other=0).to(tl.float32)
            zero = tl.load(groups + group + 1, mask=inside[:, None], other=0).to(tl.float32)
            weight = zero + step * value
            known = (tokens[:, None] < m) & inside[None, :] & (column[None, :] < k)
            entries = tl.load(x + tokens[:, None] * x_stride + column[None, :], mask=known, other=0).to(tl.float32)
            if TOKENS == 1:
                total += tl.sum(tl.trans(entries) * weight, axis=0)[None, :]
            else:
                total += tl.dot(entries, weight, input_precision="ieee")
    tl.store(
        y + tokens[:, None] * n + row[None, :],
        total.to(y.dtype.element_ty),
        mask=(tokens[:, None] < m) & (row[None, :] < n),
    )


def linear(x: torch.Tensor, fields: Fields, n: int, bits: int) -> torch.Tensor:
    """x [m, k] and stored fields -> [m, n] in x's dtype, summed in float32."""
    m, k = x.shape
    x = x.contiguous()
    high = fields["high"]
    blocks, half, _ = high.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tokens = 1 if m == 1 else 16
    _linear[(2 * blocks, triton.cdiv(m, tokens))](
        x,
        fields["groups"],
        high,
        fields.get("third", high),
        fields.get("fourth", high),
        fields.get("low", high),
        y,
        m,
        n,
        k,
        x.stride(0),
        blocks * 64,
        half,
        BITS=bits,
        TOKENS=tokens,
        ROWS=ROWS,
        ENTRIES=ENTRIES,
    )
    return y
