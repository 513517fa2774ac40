"""Four terms: recency, frequency, high-precision frequency, layer distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Touch
from cache.policy import EvictionPolicy, register


@dataclass(frozen=True)
class HobbitParams:
    """The terms' weights, by default equal, since the calibrated ones were not published; `t1` as in the paper."""

    lru: float = 0.25
    lfu: float = 0.25
    lhu: float = 0.25
    fld: float = 0.25
    t1: float = 0.6
    """A use is of high precision if the experts of higher weight have at most this part of the token's weight."""


@register
class Hobbit(EvictionPolicy):
    """Evict the expert with the lowest lru R/T + lfu F/T + lhu H/T + fld (1 - d/n); everything anew in every sequence.

    T is the number of forward passes in the sequence, R the one of the last use, F the number of uses, H that of
    high-precision uses; d the layers to go to the expert's, of n. An event of several tokens is taken as one of
    their total weights. In a pool of one layer d is 0. Source: Tang et al., HOBBIT, arXiv 2411.01433.
    """

    name = "hobbit"
    Params = HobbitParams

    def reset(self) -> None:
        super().reset()
        self._last = self.zeros()  # lru R
        self._counted = self.zeros()  # lfu F + lhu H
        self._flat_last, self._flat_counted = self._last.reshape(-1), self._counted.reshape(-1)
        self._gains = np.array([self.params.lfu, self.params.lfu + self.params.lhu])  # of a low use, of a high one
        self._start = 0
        self._row = 0
        self._nearness = self.params.fld * (1 - self.lanes.distances() / self.num_layers)

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        params = self.params
        if touch.new_sequence:
            self._last[:] = 0
            self._counted[:] = 0
            self._start = self.step - 1
        self._row = touch.columns.start // self.num_experts
        high = touch.shares_above() <= params.t1
        self._flat_last[touch.at] = params.lru * (self.step - self._start)
        self._flat_counted[touch.at] += self._gains[high.view(np.int8)]

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        passes = max(self.step - self._start, 1)
        worth: NDArray[np.float64] = self._last[lanes] + self._counted[lanes]
        worth /= passes
        worth += self._nearness[self._row]
        return worth
