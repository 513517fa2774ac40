"""Fewest uses in the near future."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Future, Touch
from cache.policy import EvictionPolicy, register


@dataclass(frozen=True)
class SCHParams:
    """`m`: how many forward passes are known ahead."""

    m: int = 16

    def __post_init__(self) -> None:
        if self.m < 1:
            raise ValueError(f"m is {self.m}, not positive")


@register
class SCH(EvictionPolicy):
    """Evict the expert with the fewest uses in its layer's next `m` forward passes; offline; ties by LRU.

    The rule behind the segment cache hit rate of Liang et al., "Not All Models Suit Expert Offloading",
    arXiv 2505.16056, which counts first touches as hits as long as there is room: here they are misses.
    """

    name = "sch"
    Params = SCHParams
    causal = False

    def reset(self) -> None:
        super().reset()
        self._ahead = self.zeros(np.int32)

    def foresee(self, future: Future) -> None:
        self._future = future
        self._window = self.params.m * future.times_per_pass
        for time in range(min(self._window, future.times)):
            self._ahead.reshape(-1)[future.at(time)] += 1

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        ahead = self._ahead.reshape(-1)
        ahead[touch.at] -= 1
        time = touch.time + self._window
        if time < self._future.times:
            ahead[self._future.at(time)] += 1

    def priorities(self, lanes: slice) -> NDArray[np.int32]:
        return self._ahead[lanes]
