"""Least recently used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy, register


@register
class LRU(EvictionPolicy):
    """Evict the expert whose last use is longest ago.

    Within an event the highest router weight is the most recent. An expert that was fetched but never used
    goes first. Source: folklore; for experts Eliseev and Mazur, arXiv 2312.17238.
    """

    name = "lru"

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        return self.recency[lanes]
