"""A decoder layer's attention sublayer for one token, for NF4 or bfloat16 matrices in one call of our kernel.

It is the norm before attention, attention with the token's place in the KV cache, the sum with what came in, and the
norm after it. Calls one by one would take longer than small products.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from offload.formats.cpu import attention
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.native import library
from offload.formats.cpu.room import room
from offload.formats.cpu.routing import TokenRouter
from offload.formats.cpu.token_heads import Heads

_JOB = struct.Struct("=10qd2q")


class Rows(NamedTuple):
    """Addresses of rows [n, k] of the output projection, as in `Projection`, and of their bias [n], 0 for none."""

    numbers: int
    absmax: int
    bias: int
    n: int


class AttentionSublayer:
    """Heads, then attention that multiplies scores by `scale`, then the output projection: blocks of `output`.

    `before` and `after` are the addresses of the norms' weights [hidden]; both norms add `epsilon`, and with `twice`
    round before their weight. What the addresses point to must stay. `sinks`: see `attention.one_token`.
    """

    def __init__(
        self,
        heads: Heads,
        output: Sequence[Rows],
        before: int,
        after: int,
        epsilon: float,
        *,
        twice: bool,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self._heads = heads
        self._output = array("q", [field for rows in output for field in rows])
        self._blocks = len(output)
        self._hidden = sum(rows.n for rows in output)
        self._before, self._after = before, after
        self._epsilon, self._twice, self._scale = epsilon, twice, scale
        self._sinks = sinks

    def compute(
        self,
        x: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        router: TokenRouter | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., hidden] -> x and what attention gives, added up, and the norm of that, both of x's shape. A `router`
        chooses by that norm.

        cosines and sines as for `Heads`, key and value [1, H / G, L, width], all bfloat16. Side effect: the last place
        of key and value, which is the token's, is written to. mask: see `attention.one_token`.
        """
        total, y = torch.empty_like(x), torch.empty_like(x)
        shared, width = key.shape[1], self._heads.width
        queries = self._heads.total - 2 * shared * width
        shape = 1, queries // width, 1, width
        sizes = 2 * self._hidden, 2 * self._heads.total, 2 * queries, 4 * max(self._hidden, queries)
        at, places = 0, []
        for size in sizes:
            places.append(at)
            at += -(-size // 64) * 64
        nbytes = at + 4 * attention.room_words(shape, key.shape)
        held = room(nbytes if router is None else max(nbytes, router.room_bytes))
        memory = held.data_ptr()
        normed, heads, mixed, rounded = (memory + place for place in places)
        projections = self._heads.projections(heads)
        told = _JOB.pack(
            x.data_ptr(),
            self._before,
            self._after,
            self._output.buffer_info()[0],
            self._blocks,
            self._hidden,
            normed,
            total.data_ptr(),
            y.data_ptr(),
            rounded,
            self._epsilon,
            self._twice,
            0 if router is None else router.job(y.data_ptr(), memory),
        )
        told += self._heads.job(projections, normed, cosines, sines, rounded)
        told += attention.job(heads, queries // width, key, value, mask, mixed, memory + at, self._scale, self._sinks)
        lib = library()
        assert lib is not None
        lib.token_sublayer(told, own_threads.count())
        return total, y
