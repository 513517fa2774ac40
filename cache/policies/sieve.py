"""SIEVE: a queue, and a hand that sifts it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints, Touch
from cache.policy import EvictionPolicy, register

_ROUND = 2**50  # beyond every admission's number; three of them still fit into a float64


@register
class SIEVE(EvictionPolicy):
    """Evict the first expert from the hand on that was not used since it was admitted or the hand last passed it.

    The hand goes from the oldest admission to the newest, and round again. It forgives those that were used, once, and
    stays where it evicted; unlike in CLOCK, nothing moves. An event uses its members before the hand moves.
    Source: Zhang et al., SIEVE is Simpler than LRU, NSDI 2024.
    """

    name = "sieve"

    def reset(self) -> None:
        super().reset()
        self.admitted = self.zeros(np.int64)
        """The number of the expert's admission, from 1; 0 for one that is not there."""
        self.visited = self.zeros(np.bool_)
        self.hand = np.zeros(self.lanes.count, np.int64)
        """The admission that each lane's hand passed last; 0 before the oldest."""
        self._admissions = 0

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        self.visited.reshape(-1)[touch.at] = True

    def on_insert(self, at: Ints) -> None:
        self._admissions += 1
        self.admitted.reshape(-1)[at] = self._admissions
        self.visited.reshape(-1)[at] = False

    def on_evict(self, at: Ints) -> None:
        lanes, columns = np.divmod(at, self.lanes.width)
        admitted = self.admitted[lanes]
        victim = admitted[np.arange(len(lanes)), columns][:, None]
        hand = self.hand[lanes][:, None]
        behind, before = admitted > hand, admitted < victim
        passed = np.where(victim > hand, behind & before, behind | before)
        passed |= self.visited.reshape(-1)[at][:, None]  # the victim was, so the hand has been all the way round
        self.visited[lanes] &= ~passed
        self.hand[lanes] = np.where((admitted > victim).any(axis=1), victim[:, 0], 0)
        self.admitted.reshape(-1)[at] = 0

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        # What the hand meets first, next round, and the same again for those that it forgives.
        admitted = self.admitted[lanes]
        rounds = (admitted <= self.hand[lanes, None]) + 2 * self.visited[lanes]
        met: Ints = admitted + _ROUND * rounds
        return met
