"""Experts of NF4 matrices computed whole, two products and a gate between: several in one call of our kernel."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch

from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.native import library
from offload.formats.cpu.room import room
from offload.formats.gate import Gate

_JOB = struct.Struct("=11q3dq")


class Nf4Rows:
    """Rows of x [T, hidden], bfloat16, that go to experts. Several are rounded once for all of them.

    `levels` are NF4's 16 as integers: see `offload.formats.cpu.nf4.products`.
    """

    def __init__(self, x: torch.Tensor, levels: torch.Tensor, most_rows: int, gate: Gate) -> None:
        self.most_rows = most_rows
        self._levels, self._gate = levels, gate
        self._x = x = x.contiguous()
        self._tokens, self._hidden = x.shape
        self._bits = 8 * levels.itemsize
        self._rounded: torch.Tensor | None = None
        if self._tokens > 1:
            lib = library()
            assert lib is not None
            self._rounded = torch.empty(_rounded_bytes(self._tokens, self._hidden), dtype=torch.uint8, device="cpu")
            to = self._rounded.data_ptr()
            lib.nf4_round(x.data_ptr(), self._tokens, self._hidden, self._bits, to, own_threads.count())

    def compute(
        self,
        places: Sequence[tuple[int, ...]],
        order: torch.Tensor,
        spans: Sequence[tuple[int, int]],
        y: torch.Tensor,
    ) -> None:
        """See `offload.formats.base.GatedRows`. A place has the addresses of the biases, of the gate's and up's packed
        matrix [2 * inner, H] and of the down matrix [H, inner], each codes and absmax, and at last inner."""
        first, at, inner = order.data_ptr(), 0, places[0][-1]
        told: list[int] = []
        for place, (start, end) in zip(places, spans, strict=True):
            told += place[:-1]
            told += first + 8 * start, end - start, at
            at += end - start
        experts = array("q", told)
        between = _rounded_bytes(at, inner)
        token, rounded = 0, self._rounded
        if rounded is None:
            memory = room(between + _rounded_bytes(1, self._hidden))
            token, to = self._x.data_ptr(), memory.data_ptr() + between
        else:
            memory, to = room(between), rounded.data_ptr()
        job = _JOB.pack(
            experts.buffer_info()[0],
            len(places),
            self._hidden,
            inner,
            len(y) // self._tokens,
            token,
            to,
            y.data_ptr(),
            self._levels.data_ptr(),
            self._bits,
            memory.data_ptr(),
            *self._gate,
        )
        lib = library()
        assert lib is not None
        lib.nf4_experts(job, own_threads.count())


def _rounded_bytes(rows: int, width: int) -> int:
    """What `rows` of `width` numbers take, rounded: no kernel takes more than 34 words for 64 of them."""
    return -(-rows * width // 64 * 34 * 4 // 64) * 64
