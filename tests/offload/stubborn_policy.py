"""A policy for stress tests: low ids are worth more, and what is fetched must outrank what would have to go."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy


class Stubborn(EvictionPolicy):
    """A fixed order of experts."""

    bypass = True

    def priorities(self, lanes: slice) -> NDArray[Any]:
        shape = self.recency[lanes].shape
        return np.broadcast_to(-(np.arange(shape[1]) % self.lanes.experts).astype(np.float64), shape)
