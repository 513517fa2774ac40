"""Least frequently used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy, register


@register
class LFU(EvictionPolicy):
    """Evict the expert with the fewest uses since the reset, resident or not at the time; ties by LRU.

    Source: folklore ("perfect" LFU, since eviction forgets no use).
    """

    name = "lfu"

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        return self.uses[lanes]
