"""Least frequently used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Touch
from cache.policy import EvictionPolicy, register


@dataclass(frozen=True)
class LFUParams:
    """`reset`: count anew in every sequence, rather than from the first event on."""

    reset: bool = False


@register
class LFU(EvictionPolicy):
    """Evict the expert with the fewest uses so far, resident or not at the time; ties by LRU.

    Source: folklore ("perfect" LFU, since eviction forgets no use); counting by sequence: Tang et al., HOBBIT,
    arXiv 2411.01433.
    """

    name = "lfu"
    Params = LFUParams

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        if touch.new_sequence and self.params.reset:
            self.uses[:] = 0
            self.uses.reshape(-1)[touch.at] = 1

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        return self.uses[lanes]
