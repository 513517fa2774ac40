"""What this forward pass has not touched goes first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints
from cache.policy import EvictionPolicy, register


@register
class LeastStale(EvictionPolicy):
    """Evict stale experts, not used in this forward pass, before fresh ones; among each first in, first out.

    In a pool of one layer everything but the event's own members is stale, which makes it FIFO. Source: Hoang et al.,
    SpecMD, arXiv 2602.03921.
    """

    name = "least-stale"

    def reset(self) -> None:
        super().reset()
        self._arrival = self.zeros(np.int64)
        self._arrivals = 0

    def on_insert(self, at: Ints) -> None:
        self._arrivals += 1
        self._arrival.reshape(-1)[at] = self._arrivals

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        fresh = self.last_step[lanes] == self.step
        order: NDArray[np.int64] = self._arrival[lanes] + fresh * _FRESH
        return order


_FRESH = 2**52  # more than there are arrivals, and exact as float64
