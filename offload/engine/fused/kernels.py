"""All experts of a layer in two launches: Triton kernels that find each expert's weights by its slot.

The first launch computes gate_up and the activation of every (token, k) pair, the second down, and the weighted sum
over k. A pair's numbers depend on its token, its expert and the shapes alone: not on how many pairs there are, which
slots their experts are in, or in how many calls they are computed. Sums run in one order, and nothing is added
atomically.

Pairs read their weights by themselves. Programs that differ in the pair alone are neighbours, so that what several
tokens read of one expert comes from the GPU's cache.

Unverified: it has run in Triton's interpreter on a CPU, and was compiled for CUDA, but has not run on a GPU.
Importing this imports Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from offload.engine.fused.places import ExpertPlaces, MatrixPlace
from offload.engine.fused.product import product
from offload.formats.nf4 import code

# Outputs and places of the input that one program takes at a time. Neighbours in memory are inputs, except in
# transposed matrices and in the nested format, where they are outputs. Not measured.
_TILES = {"plain": (16, 128), "int8": (16, 128), "nf4": (16, 128), "transposed": (64, 32)}
_NESTED_TILE = (32, 64)
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _gate_up(
    x: tl.tensor,
    slots: tl.tensor,
    inner: tl.tensor,
    block: tl.tensor,
    slot_bytes: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    fourth: tl.tensor,
    fifth: tl.tensor,
    bias: tl.tensor,
    levels: tl.tensor,
    top_k: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    places: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    PLAIN: tl.constexpr,
    BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CLAMPED: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """One program: one (token, k) pair and half of ROWS of its [I] numbers between the projections."""
    pair = tl.program_id(0)
    index = tl.load(slots + pair)
    if index < 0:
        return
    slot = block + index.to(tl.int64) * slot_bytes
    HALF: tl.constexpr = ROWS // 2
    width = n // 2
    start = tl.program_id(1) * HALF
    j = tl.arange(0, ROWS)
    if INTERLEAVED:
        column, rows = start + j // 2, 2 * start + j
    else:
        column = start + j % HALF
        rows = column + j // HALF * width
    y = product(
        x + (pair // top_k).to(tl.int64) * k,
        slot,
        first,
        second,
        third,
        fourth,
        fifth,
        bias,
        levels,
        rows,
        column < width,
        n,
        k,
        places,
        KIND,
        BITS,
        WHOLE,
        PLAIN,
        BIAS,
        ROWS,
        ENTRIES,
    )
    both = tl.reshape(y, (HALF, 2)) if INTERLEAVED else tl.trans(tl.reshape(y, (2, HALF)))
    gate, up = tl.split(both)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1
    activated = up * gate * tl.sigmoid(gate * alpha)
    out = start + tl.arange(0, HALF)
    place = inner + pair.to(tl.int64) * width + out
    tl.store(place, activated.to(inner.dtype.element_ty), mask=out < width)


@triton.jit(do_not_specialize=["complete"])
def _down(
    inner: tl.tensor,
    slots: tl.tensor,
    weights: tl.tensor,
    partial: tl.tensor,
    out: tl.tensor,
    block: tl.tensor,
    slot_bytes: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    fourth: tl.tensor,
    fifth: tl.tensor,
    bias: tl.tensor,
    levels: tl.tensor,
    top_k: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    places: tl.tensor,
    complete: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    PLAIN: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """One program: ROWS outputs of one token, over its k one after the other.

    `complete` is no constant of the kernel: the very same instructions compute a pair alone and among others.
    """
    token = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = rows < n
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for choice in range(0, top_k):
        pair = (token * top_k + choice).to(tl.int64)
        index = tl.load(slots + pair)
        kept = partial + pair * n + rows
        y = tl.zeros((ROWS,), dtype=tl.float32)
        if index >= 0:
            slot = block + index.to(tl.int64) * slot_bytes
            y = product(
                inner + pair * k,
                slot,
                first,
                second,
                third,
                fourth,
                fifth,
                bias,
                levels,
                rows,
                valid,
                n,
                k,
                places,
                KIND,
                BITS,
                WHOLE,
                PLAIN,
                BIAS,
                ROWS,
                ENTRIES,
            )
            if complete == 0:
                tl.store(kept, y, mask=valid)
        elif complete != 0:
            y = tl.load(kept, mask=valid, other=0)
        total += y * tl.load(weights + pair).to(tl.float32)
    if complete != 0:
        tl.store(out + token.to(tl.int64) * n + rows, total.to(out.dtype.element_ty), mask=valid)


def gate_up(
    x: torch.Tensor, slots: torch.Tensor, inner: torch.Tensor, block: torch.Tensor, places: ExpertPlaces
) -> None:
    """x [T, H] and slots int32 [T, K] -> `inner` [T*K, I], where a slot is not negative; one launch.

    `block` (uint8) are equal slots in a row. All contiguous, on one device. Waits for nothing.
    """
    matrix, activation = places.gate_up, places.activation
    constants, rows = constants_of(matrix)
    _gate_up[(slots.numel(), triton.cdiv(matrix.n // 2, rows // 2))](
        x,
        slots,
        inner,
        block,
        places.slot_bytes,
        *_addresses(matrix),
        _levels(x.device),
        slots.shape[1],
        matrix.n,
        matrix.k,
        _places(matrix),
        activation.alpha,
        activation.limit or 0.0,
        INTERLEAVED=activation.interleaved,
        CLAMPED=activation.limit is not None,
        **constants,
    )


def down(
    inner: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    partial: torch.Tensor,
    out: torch.Tensor,
    block: torch.Tensor,
    places: ExpertPlaces,
    complete: bool,
) -> None:
    """inner [T*K, I], slots int32 [T, K] and weights [T, K] -> `out` [T, H]; one launch.

    Not `complete`: the pairs with slots only, unweighted, into `partial` float32 [T*K, H]. Complete: pairs without a
    slot are taken from there, all are weighted and summed over k, in its order. `block` as for `gate_up`.
    """
    matrix = places.down
    constants, rows = constants_of(matrix)
    _down[(len(slots), triton.cdiv(matrix.n, rows))](
        inner,
        slots,
        weights,
        partial,
        out,
        block,
        places.slot_bytes,
        *_addresses(matrix),
        _levels(inner.device),
        slots.shape[1],
        matrix.n,
        matrix.k,
        _places(matrix),
        int(complete),
        **constants,
    )


def constants_of(matrix: MatrixPlace) -> tuple[dict[str, Any], int]:
    """What a kernel is compiled for, and its ROWS."""
    nested = matrix.kind.startswith("nested")
    rows, entries = _NESTED_TILE if nested else _TILES[matrix.kind]
    return {
        "KIND": "nested" if nested else matrix.kind,
        "BITS": int(matrix.kind.removeprefix("nested")) if nested else 0,
        "WHOLE": matrix.k % 64 == 0,
        "PLAIN": _DTYPES[matrix.dtype],
        "BIAS": matrix.bias is not None,
        "ROWS": rows,
        "ENTRIES": entries,
    }, rows


def _places(matrix: MatrixPlace) -> int:
    """Over how many places of its input a row of a matrix goes."""
    return matrix.k if matrix.kind in _TILES and matrix.kind != "nf4" else (matrix.k + 1) // 2


def _addresses(matrix: MatrixPlace) -> tuple[int, ...]:
    """Bytes of the slot: weights or codes, scales, three more planes, bias; what is not there is never read."""
    return (*(*matrix.fields, 0, 0, 0, 0)[:5], matrix.bias or 0)


@functools.cache
def _levels(device: torch.device) -> torch.Tensor:
    return code().to(device)
