"""Experts of NF4 matrices computed whole, two products and a gate between: several in one call of our kernel."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch

from offload.formats.cpu import begun, combine
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.native import library
from offload.formats.cpu.room import room
from offload.formats.cpu.routing import TokenRouter
from offload.formats.gate import Gate

_JOB = struct.Struct("=12q3dq")


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
        first, rows = order.data_ptr(), 0
        told = array("q")
        for place, (start, end) in zip(places, spans, strict=True):
            told.extend((*place[:-1], first + 8 * start, end - start, rows))
            rows += end - start
        between = _rounded_bytes(rows, places[0][-1])
        token = _rounded_bytes(1, self._hidden) if self._rounded is None else 0
        memory = room(between + token)
        at = memory.data_ptr()
        job = self._job(told, places[0][-1], y.data_ptr(), len(y) // self._tokens, at, at + between)
        lib = library()
        assert lib is not None
        lib.nf4_experts(job, own_threads.count())

    def token(self, places: Sequence[bytes], inner: int, router: TokenRouter, before: torch.Tensor) -> torch.Tensor:
        """See `offload.formats.base.GatedRows`."""
        count = len(places)
        between, y = _rounded_bytes(count, inner), _rounded_bytes(1, self._hidden)
        memory = room(between + y + 2 * count * self._hidden, begun=True)
        at = memory.data_ptr()
        y += between + at
        out, sum_ = combine.token_sum(y, router, before)
        experts = combine.row_each(places)
        job = self._job(experts, inner, y, count, at, at + between, sum_.buffer_info()[0])
        begun.begin("nf4_experts", job, self, experts, memory, router, before, out, sum_)
        return out

    def _job(
        self, told: array[int], inner: int, y: int, top_k: int, between: int, rounded: int, sum_: int = 0
    ) -> bytes:
        """What the kernel is told. `told` are nine numbers of each expert. All others but sizes are addresses."""
        return _JOB.pack(
            told.buffer_info()[0],
            len(told) // 9,
            self._hidden,
            inner,
            top_k,
            self._x.data_ptr() if self._rounded is None else 0,
            rounded if self._rounded is None else self._rounded.data_ptr(),
            y,
            self._levels.data_ptr(),
            self._bits,
            between,
            sum_,
            *self._gate,
        )


def _rounded_bytes(rows: int, width: int) -> int:
    """What `rows` of `width` numbers take, rounded: no kernel takes more than 34 words for 64 of them."""
    return -(-rows * width // 64 * 34 * 4 // 64) * 64
