"""DALI's exchange: now and then, the busiest experts outside for the idlest inside, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints, Touch
from cache.policy import EvictionPolicy, register


@dataclass(frozen=True)
class Params:
    """`w_size`: how many forward passes lie between two exchanges of a layer, tokens where one sequence goes on;
    `u_size`: how many experts each exchanges at most."""

    w_size: int = 16
    u_size: int = 2

    def __post_init__(self) -> None:
        if self.w_size < 1 or self.u_size < 1:
            raise ValueError(f"w_size is {self.w_size} and u_size {self.u_size}: both are positive")


@register
class Dali(EvictionPolicy):
    """A miss changes nothing once the cache is full. After every `w_size` passes of a layer, the `u_size` experts of it
    that are outside and had the most tokens change places with those inside that had the fewest, if they had more. Then
    tokens are counted anew.

    Of equals the last used one comes, and the least recently used one goes. What is fetched ahead of use is let in, for
    the expert with the fewest tokens since the last exchange.

    Source: DALI, arXiv 2602.03495: its workload-aware cache replacement. Both sizes are ours.
    """

    name = "dali"
    Params = Params
    bypass = True
    exchanges = True
    steady = True

    def reset(self) -> None:
        super().reset()
        self._held, self._leaving = self.zeros(np.bool_), self.zeros(np.bool_)
        self._tokens = self.zeros(np.int64)
        self._passes = np.zeros((self.lanes.count, self.lanes.layers), np.int64)
        self._exchange: list[tuple[Ints, Ints]] = []

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        self._tokens.reshape(-1)[touch.at] += touch.tokens
        passes = self._passes[touch.lanes, touch.columns.start // self.lanes.experts]
        passes += 1
        over = passes == self.params.w_size
        self._exchange = []
        if over.any():
            passes[over] = 0
            lanes = np.arange(self.lanes.count)[touch.lanes][over]
            self._exchange = self._pairs(lanes, touch.columns)
            self._tokens[lanes, touch.columns] = 0

    def exchange(self) -> list[tuple[Ints, Ints]]:
        return self._exchange

    def on_insert(self, at: Ints) -> None:
        self._held.reshape(-1)[at] = True

    def on_evict(self, at: Ints) -> None:
        self._held.reshape(-1)[at] = self._leaving.reshape(-1)[at] = False

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        held = np.where(self._leaving[lanes], 0.5, 1.0 + self._tokens[lanes])
        return np.where(self._held[lanes], held, 0.0)

    def _pairs(self, lanes: Ints, columns: slice) -> list[tuple[Ints, Ints]]:
        """Who comes and who goes in a layer of these lanes; marks the latter."""
        held, tokens = self._held[lanes, columns], self._tokens[lanes, columns]
        worth = tokens * _TOKEN + self.recency[lanes, columns]
        self._leaving[lanes, columns] = False
        full = self._held[lanes].sum(axis=1) >= self.lanes.slots[lanes]
        every, first = np.arange(len(lanes)), lanes * self.lanes.width + columns.start
        found = []
        for _ in range(self.params.u_size):
            come = np.where(held, -1, worth).argmax(axis=1)
            gone = np.where(held, worth, _MOST).argmin(axis=1)
            change = full & ~held[every, come] & held[every, gone] & (tokens[every, come] > tokens[every, gone])
            if not change.any():
                break
            found.append(((first + come)[change], (first + gone)[change]))
            held[every[change], come[change]] = True
            held[every[change], gone[change]] = False
        for _, gone in found:
            self._leaving.reshape(-1)[gone] = True
        return found


_TOKEN = 2**36  # more than there are uses: recency decides between equals only
_MOST = np.iinfo(np.int64).max
