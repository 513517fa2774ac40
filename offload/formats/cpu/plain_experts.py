"""Experts of bfloat16 matrices computed whole, two products and a gate between: several in one call of our kernel."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence

import torch

from offload.formats.cpu import begun, combine
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.jobs import ROOM
from offload.formats.cpu.native import library
from offload.formats.cpu.room import room
from offload.formats.cpu.routing import TokenRouter
from offload.formats.gate import Gate

_JOB = struct.Struct("=10q3dq")
_TILE = 32  # hidden and inner are multiples of it
_APART = 16  # floats between two widened rows


def serves(up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether the kernel computes experts of these matrices [2 * inner, H] and [H, inner]."""
    bf16 = up.dtype is down.dtype is torch.bfloat16
    there = up.device.type == down.device.type == "cpu" and up.is_contiguous() and down.is_contiguous()
    return bf16 and there and not (up.shape[1] % _TILE or down.shape[1] % _TILE)


def place(up: torch.Tensor, down: torch.Tensor) -> tuple[int, ...]:
    """By what `PlainRows` knows an expert: the addresses of its matrices, and inner."""
    return up.data_ptr(), down.data_ptr(), down.shape[1]


class PlainRows:
    """Rows of x [T, hidden], bfloat16, that go to experts, of up to `most_rows` rows each."""

    def __init__(self, x: torch.Tensor, most_rows: int, gate: Gate) -> None:
        self._x = x.contiguous()
        self.most_rows = most_rows
        self._gate = gate

    def compute(
        self,
        places: Sequence[tuple[int, ...]],
        order: torch.Tensor,
        spans: Sequence[tuple[int, int]],
        y: torch.Tensor,
    ) -> None:
        """See `offload.formats.base.GatedRows`; a place has the addresses of the biases, too,
        and then what `place` says."""
        tokens, hidden = self._x.shape
        inner = places[0][-1]
        widths = hidden + _APART, inner + _APART
        for pieces in _pieces(spans, max(ROOM // sum(widths), 1)):
            told, rows = array("q"), 0
            for i, start, end in pieces:
                told.extend((*places[i][:-1], order.data_ptr() + 8 * start, end - start, rows))
                rows += end - start
            memory = room(4 * rows * sum(widths))
            at = memory.data_ptr()
            job = self._job(told, inner, y.data_ptr(), len(y) // tokens, at, at + 4 * rows * widths[0])
            lib = library()
            assert lib is not None
            lib.plain_experts(job, own_threads.count())

    def token(self, places: Sequence[bytes], inner: int, router: TokenRouter, before: torch.Tensor) -> torch.Tensor:
        """See `offload.formats.base.GatedRows`."""
        count, hidden, told = len(places), self._x.shape[1], combine.row_each(places)
        widths = 4 * count * (hidden + _APART), 4 * count * (inner + _APART)
        memory = room(sum(widths) + 2 * count * hidden, begun=True)
        at = memory.data_ptr()
        y = at + sum(widths)
        out, sum_ = combine.token_sum(y, router, before)
        job = self._job(told, inner, y, count, at, at + widths[0], sum_.buffer_info()[0])
        begun.begin("plain_experts", job, self, told, memory, router, before, out, sum_)
        return out

    def _job(self, told: array[int], inner: int, y: int, top_k: int, rows: int, between: int, sum_: int = 0) -> bytes:
        """What the kernel is told. `told` are seven numbers of each expert. All others but sizes are addresses."""
        return _JOB.pack(
            told.buffer_info()[0],
            len(told) // 7,
            self._x.shape[1],
            inner,
            top_k,
            self._x.data_ptr(),
            y,
            rows,
            between,
            sum_,
            *self._gate,
        )


def _pieces(spans: Sequence[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces of spans, each with its span's number, that together have up to `most` rows."""
    group: list[tuple[int, int, int]] = []
    left = most
    for i, (start, end) in enumerate(spans):
        while start < end:
            count = min(end - start, left)
            group.append((i, start, start + count))
            start, left = start + count, left - count
            if not left:
                yield group
                group, left = [], most
    if group:
        yield group
