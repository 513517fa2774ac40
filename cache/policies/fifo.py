"""First in, first out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints
from cache.policy import EvictionPolicy, register


@register
class FIFO(EvictionPolicy):
    """Evict the expert that was admitted the longest ago, however often it was used since.

    Source: folklore; the queue that `sieve` and `s3fifo` start from.
    """

    name = "fifo"

    def reset(self) -> None:
        super().reset()
        self.admitted = self.zeros(np.int64)
        self._admissions = 0

    def on_insert(self, at: Ints) -> None:
        self._admissions += 1
        self.admitted.reshape(-1)[at] = self._admissions

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        return self.admitted[lanes]
