"""Least frequently and recently used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy, register


@register
class LFRU(EvictionPolicy):
    """Evict the expert with the lowest f / (age + 1): uses, and forward passes since the last; ties by LRU.

    Source: Zhang, arXiv 2608.07911. Below 2**26 uses and passes, two quotients are equal as float64 exactly
    when they are equal as fractions, so ties are exact.
    """

    name = "lfru"

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        age = self.step - self.last_step[lanes]
        return self.uses[lanes] / (age + 1)
