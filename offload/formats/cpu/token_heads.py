"""What one token's attention begins with, for NF4 or bfloat16 matrices in one call: queries, keys and values.

Norms of heads and the rotation by position are a part of it.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.native import library

_JOB = struct.Struct("=10qd3q")


class Projection(NamedTuple):
    """Addresses of a matrix [n, k], of its bias [n] and of the weight [normed] of a norm; 0 for none.

    NF4 has packed codes and absmax; a bfloat16 matrix has its numbers, and no absmax. `rotated`: its heads are rotated
    by the token's position. `normed`: the norm is over so many numbers, a head's or more, which begin with this
    matrix's.
    """

    numbers: int
    absmax: int
    bias: int
    norm: int
    n: int
    rotated: bool
    normed: int = 0


class Heads:
    """Projections of one input, each to a multiple of `width` numbers. `levels` are NF4's 16 as integers; none: the
    matrices are bfloat16.

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
        levels: torch.Tensor | None,
    ) -> None:
        self.width = width
        self.total = sum(each.n for each in projections)
        """How many numbers all projections give together."""
        self.levels = levels
        self.twice = twice
        self._projections = projections
        self._k, self._epsilon = k, epsilon
        self._whole = any(each.normed > width for each in projections)

    def compute(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """x [k], cosines and sines [width] -> what all projections give [sum of n], all bfloat16 and contiguous.

        Cosines and sines may be those of a head's first half [width / 2], which the second one shares.
        """
        y = torch.empty(self.total, dtype=torch.bfloat16, device="cpu")
        room = torch.empty(self._k, dtype=torch.int32, device="cpu")
        projections = self.projections(y.data_ptr())
        job = self.job(projections, x.data_ptr(), cosines, sines, room.data_ptr())
        lib = library()
        assert lib is not None
        lib.token_heads(job, own_threads.count())
        return y

    def projections(self, y: int) -> array[int]:
        """What the kernel is told of the projections, whose numbers go to the address `y`."""
        told = array("q")
        for numbers, absmax, bias, norm, n, rotated, normed in self._projections:
            told.extend((numbers, absmax, bias, norm, y, n, rotated, normed))
            y += 2 * n
        return told

    def job(self, projections: array[int], x: int, cosines: torch.Tensor, sines: torch.Tensor, room: int) -> bytes:
        """What the kernel is told: see `compute`. x and `room` are addresses; room has 4 bytes for each number of x."""
        return _JOB.pack(
            x,
            projections.buffer_info()[0],
            len(self._projections),
            self._k,
            self.width,
            cosines.data_ptr(),
            sines.data_ptr(),
            0 if cosines.numel() < self.width else self.width // 2,
            0 if self.levels is None else self.levels.data_ptr(),
            room,
            self._epsilon,
            0 if self.levels is None else 8 * self.levels.itemsize,
            self.twice,
            self._whole,
        )
