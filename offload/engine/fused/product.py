"""A part of a matrix times a vector in Triton, whatever format the matrix has: what other kernels are made of.

Importing this imports Triton. The compiler reads annotations, too, and knows only Triton's own names.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nf4(
    slot: tl.tensor,
    codes: tl.tensor,
    absmax: tl.tensor,
    levels: tl.tensor,
    row: tl.tensor,
    i: tl.tensor,
    side: tl.constexpr,
    known: tl.tensor,
    k: tl.tensor,
    half: tl.tensor,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Weights at inputs 2i + side of rows. WHOLE: k is a multiple of 64, so blocks begin where rows do."""
    byte = tl.load(slot + codes + row * half + i, mask=known, other=0).to(tl.int32)
    level = (byte >> 4) if side == 0 else (byte & 15)
    block = row * (k // 64) + i // 32 if WHOLE else (row * k + 2 * i + side) // 64
    scale = tl.load((slot + absmax).to(tl.pointer_type(tl.float32)) + block, mask=known, other=0)
    return tl.load(levels + level) * scale


@triton.jit
def _nested(
    slot: tl.tensor,
    high: tl.tensor,
    groups: tl.tensor,
    third: tl.tensor,
    fourth: tl.tensor,
    low: tl.tensor,
    row: tl.tensor,
    i: tl.tensor,
    side: tl.constexpr,
    known: tl.tensor,
    n: tl.tensor,
    half: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Weights at inputs i + side * half of rows. Row r is in byte r % 32 of block r // 64, in its low or high bits."""
    block, shift, j = row // 64, row % 64 // 32 * 4, row % 32
    column = i + side * half
    plane = (block * half + i) * 32 + j
    code = tl.load(slot + high + plane, mask=known, other=0).to(tl.int32) >> shift
    code = (code & 12) if side == 0 else ((code & 3) << 2)
    if BITS == 2:
        code += 2 - (code >> 3)
    else:
        quarter = (half + 1) // 2
        late = i >= quarter  # inputs whose bits lie beside those of an earlier one
        plane = (block * quarter + tl.where(late, i - quarter, i)) * 32 + j
        rest = tl.load(slot + third + plane, mask=known, other=0).to(tl.int32) >> shift
        rest = tl.where(late, rest << 1, rest) & 10
        if BITS > 3:
            bit = tl.load(slot + fourth + plane, mask=known, other=0).to(tl.int32) >> shift
            rest |= tl.where(late, bit >> 1, bit) & 5
        code |= (rest & 3) if side == 0 else ((rest >> 2) & 3)
    value = code.to(tl.float32) - (7.5 if BITS == 3 else 8)
    if BITS == 8:
        fine = tl.load(slot + low + (block * 2 * half + column) * 32 + j, mask=known, other=0).to(tl.int32) >> shift
        value += ((fine & 15).to(tl.float32) - 7.5) / 16
    # Step and zero are bfloat16 and fill a word, step first: the upper halves of two float32s.
    group = column // 64 * ((n + 63) // 64 * 64) + row
    both = tl.load((slot + groups).to(tl.pointer_type(tl.int32)) + group, mask=known, other=0)
    step, zero = (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    return zero + step * value


@triton.jit
def product(
    x: tl.tensor,
    slot: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    fourth: tl.tensor,
    fifth: tl.tensor,
    bias: tl.tensor,
    levels: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    places: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    PLAIN: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> tl.tensor:
    """`rows` [ROWS] of a matrix [n, k] times x [k], plus their biases -> float32 [ROWS]; 0 where not `valid`.

    The matrix's fields begin at the bytes `first` to `fifth` of `slot`, in the order of `MatrixPlace.fields`. KIND is
    "plain", "transposed", "int8", "nf4" or "nested", of so many BITS; PLAIN the type of plain weights and biases; WHOLE
    whether k is a multiple of 64. A row goes over `places`: k, or half as many where a byte has two inputs, its sides.
    """
    SIDES: tl.constexpr = 2 if KIND == "nf4" or KIND == "nested" else 1
    row = rows[:, None]
    plain = (slot + first).to(tl.pointer_type(PLAIN))
    total = tl.zeros((ROWS, ENTRIES), dtype=tl.float32)
    for start in range(0, places, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        inside = place < places
        i = place[None, :]
        known = valid[:, None] & inside[None, :]
        for side in tl.static_range(SIDES):
            column = 2 * place + side if KIND == "nf4" else place + side * places
            if KIND == "plain":
                weight = tl.load(plain + row * k + i, mask=known, other=0).to(tl.float32)
            elif KIND == "transposed":
                weight = tl.load(plain + i * n + row, mask=known, other=0).to(tl.float32)
            elif KIND == "int8":
                codes = (slot + first).to(tl.pointer_type(tl.int8))
                weight = tl.load(codes + row * k + i, mask=known, other=0).to(tl.float32)
            elif KIND == "nf4":
                weight = _nf4(slot, first, second, levels, row, i, side, known, k, places, WHOLE)
            else:
                weight = _nested(slot, first, second, third, fourth, fifth, row, i, side, known, n, places, BITS)
            if KIND == "nested":  # an odd k leaves half a byte over
                inside = (place < places) & (column < k)
            entries = tl.load(x + column, mask=inside, other=0).to(tl.float32)
            total += weight * entries[None, :]
    result = tl.sum(total, axis=1)
    if KIND == "int8":
        scales = (slot + second).to(tl.pointer_type(tl.bfloat16))
        result *= tl.load(scales + rows, mask=valid, other=0).to(tl.float32)
    if BIAS:
        biases = (slot + bias).to(tl.pointer_type(PLAIN))
        result += tl.load(biases + rows, mask=valid, other=0).to(tl.float32)
    return result
