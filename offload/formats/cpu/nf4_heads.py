"""What one token's attention begins with, for NF4 matrices in one call: queries, keys, values, norms and rotation."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.native import library

_JOB = struct.Struct("=9qd2q")


class Projection(NamedTuple):
    """Addresses of a packed matrix [n, k], of its bias [n] and of the norm of each head [width]; 0 for none.

    `rotated`: its heads are rotated by the token's position.
    """

    codes: int
    absmax: int
    bias: int
    norm: int
    n: int
    rotated: bool


class Heads:
    """Projections of one input, each to a multiple of `width` numbers. `levels` are NF4's 16 as integers.

    Norms add `epsilon`, and with `twice` round before their weight. What the addresses point to must stay.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        k: int,
        width: int,
        epsilon: float,
        *,
        twice: bool,
        levels: torch.Tensor,
    ) -> None:
        self._projections = projections
        self._k, self._width, self._epsilon, self._twice = k, width, epsilon, twice
        self._levels = levels
        self._total = sum(each.n for each in projections)

    def compute(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """x [k], cosines and sines [width], all bfloat16 and contiguous -> what all projections give [sum of n]."""
        y = torch.empty(self._total, dtype=torch.bfloat16, device="cpu")
        room = torch.empty(self._k, dtype=torch.int32, device="cpu")
        projections, at = array("q"), y.data_ptr()
        for codes, absmax, bias, norm, n, rotated in self._projections:
            projections.extend((codes, absmax, bias, norm, at, n, rotated))
            at += 2 * n
        job = _JOB.pack(
            x.data_ptr(),
            projections.buffer_info()[0],
            len(self._projections),
            self._k,
            self._width,
            cosines.data_ptr(),
            sines.data_ptr(),
            self._levels.data_ptr(),
            room.data_ptr(),
            self._epsilon,
            8 * self._levels.itemsize,
            self._twice,
        )
        lib = library()
        assert lib is not None
        lib.nf4_heads(job, own_threads.count())
        return y
