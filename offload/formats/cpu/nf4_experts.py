"""Experts of NF4 matrices computed whole, down(silu(gate(x)) * up(x)): several of them in one call of our kernel."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.native import library


class Nf4Rows:
    """Rows of x [T, hidden], bfloat16, that go to experts. They are rounded once for all of them.

    `levels` are NF4's 16 as integers: see `offload.formats.cpu.nf4.products`.
    """

    def __init__(self, x: torch.Tensor, levels: torch.Tensor, most_rows: int) -> None:
        lib = library()
        assert lib is not None
        self.most_rows = most_rows
        self._kernel = lib.nf4_experts
        self._levels = levels
        x = x.contiguous()
        self._tokens, self._hidden = x.shape
        self._rounded = _room(self._tokens, self._hidden)
        self._bits = 8 * levels.itemsize
        threads = own_threads.count() if self._tokens > 1 else 1
        lib.nf4_round(x.data_ptr(), self._tokens, self._hidden, self._bits, self._rounded.data_ptr(), threads)

    def compute(
        self,
        places: Sequence[tuple[int, ...]],
        order: torch.Tensor,
        spans: Sequence[tuple[int, int]],
        y: torch.Tensor,
    ) -> None:
        """See `offload.formats.base.GatedRows`. A place has the addresses of the gate's and up's packed matrix
        [2 * inner, H] and of the down matrix [H, inner], each codes and absmax, and at last inner."""
        first, at, inner = order.data_ptr(), 0, places[0][-1]
        job = array("q")
        for place_, (start, end) in zip(places, spans, strict=True):
            job.extend((*place_[:-1], first + 8 * start, end - start, at))
            at += end - start
        between = _room(at, inner)
        self._kernel(
            job.buffer_info()[0],
            len(places),
            self._hidden,
            inner,
            len(y) // self._tokens,
            self._rounded.data_ptr(),
            y.data_ptr(),
            self._bits,
            self._levels.data_ptr(),
            between.data_ptr(),
            own_threads.count(),
        )


def _room(rows: int, width: int) -> torch.Tensor:
    """Memory for `rows` of `width` numbers, rounded: no kernel takes more than 34 words for 64 of them."""
    return torch.empty(rows * width // 64 * 34, dtype=torch.int32, device="cpu")
