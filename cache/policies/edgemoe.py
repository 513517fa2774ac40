"""Frequency over layer distance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Touch
from cache.policy import EvictionPolicy, register


@register
class EdgeMoE(EvictionPolicy):
    """Evict the expert with the lowest f / (d + 1): uses so far, and layers to go to the expert's; ties by LRU.

    Source: Yi et al., EdgeMoE, arXiv 2308.14352, which keeps experts of high frequency and near layers; its formula
    was not published, this one is what others implement. In a pool of one layer it is LFU.
    """

    name = "edgemoe"

    def reset(self) -> None:
        super().reset()
        self._row = 0
        self._nearness = 1 / (self.lanes.distances() + 1)

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        self._row = touch.columns.start // self.num_experts

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        worth: NDArray[np.float64] = self.uses[lanes] * self._nearness[self._row]
        return worth
