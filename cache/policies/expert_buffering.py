"""What this batch does not use goes first, then what came in last."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints
from cache.policy import EvictionPolicy, register


@register
class ExpertBuffering(EvictionPolicy):
    """Evict experts that this batch, a forward pass, does not use before those that it uses; among each last in, first
    out.

    A layer runs its experts by ascending number, so of those that a pass brings in, the highest is the last one in, and
    the next pass comes to it last. Where a batch uses more experts than there is room for, the first ones therefore
    stay, and the others pass through: in the original the last one of these stays in the place it was given.

    Source: expert buffering, Huang et al., arXiv 2303.06182, section VI.
    """

    name = "expert-buffering"
    bypass = True

    def reset(self) -> None:
        super().reset()
        self._arrival = self.zeros(np.int64)  # 0: it is not here

    def on_insert(self, at: Ints) -> None:
        self._arrival.reshape(-1)[at] = self._now(at % self.lanes.width)

    def on_evict(self, at: Ints) -> None:
        self._arrival.reshape(-1)[at] = 0

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        held = self._arrival[lanes]
        arrival = np.where(held, held, self._now(np.arange(self.lanes.width)))
        active = self.last_step[lanes] == self.step
        order: NDArray[np.int64] = active * _ACTIVE - arrival
        return order

    def _now(self, columns: Ints) -> Ints:
        """When these experts come in, if they do in this pass: passes, then layers, then numbers."""
        return self.step * self.lanes.width + columns + 1


_ACTIVE = 2**52  # more than there are arrivals, and exact as float64
