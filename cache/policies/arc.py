"""Adaptive replacement cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints, Touch
from cache.policy import EvictionPolicy, register

_AWAY, _T1, _T2, _B1, _B2, _RETURNING = range(6)
_GROUP = 2**50  # beyond every recency
_LATER = np.iinfo(np.int64).max
_EVICTED = np.array([_AWAY, _B1, _B2, _B1, _B2, _RETURNING], np.int8)


@register
class ARC(EvictionPolicy):
    """Two LRU lists, of experts used once (T1) and more often (T2), and how long T1 should be, learnt from regrets.

    Each list remembers what it lost last, as B1 and B2: T1 and B1 together are at most as many experts as the cache has
    slots, all four twice as many. A use of something in B1 lets T1's target length p grow, one of something in B2 lets
    it shrink, the faster the shorter that memory is beside the other. While T1 is longer than p it loses its oldest;
    else T2 does. An event looks all its members up, in touch order, before anything goes.
    Source: Megiddo and Modha, ARC: A Self-Tuning, Low Overhead Replacement Cache, FAST 2003.
    """

    name = "arc"

    def reset(self) -> None:
        super().reset()
        self.where = self.zeros(np.int8)
        """The list that an expert is in. RETURNING: it was found in B1 or B2 and not admitted yet."""
        self.forgotten = self.zeros(np.int64)
        """The number of the eviction that put it into B1 or B2."""
        self.p = np.zeros(self.lanes.count)
        self._from_b2 = np.zeros(self.lanes.count, np.bool_)
        self._evictions = 0

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        where = self.where.reshape(-1)
        found = where[touch.at]
        self._from_b2[touch.lanes] = (found == _B2).any(axis=1)
        where[touch.at[found == _T1]] = _T2
        regrets = ((found == _B1) | (found == _B2)).any(axis=1)
        if regrets.any():
            rows = regrets.nonzero()[0]
            self._adapt(rows + touch.lanes.start, touch.at[rows])

    def _adapt(self, lanes: Ints, at: Ints) -> None:
        where = self.where.reshape(-1)
        for members in at.T:
            found = where[members]
            in_b1, in_b2 = found == _B1, found == _B2
            lists = self.where[lanes]
            b1, b2 = (np.maximum((lists == ghosts).sum(axis=1), 1) for ghosts in (_B1, _B2))
            step = in_b1 * np.maximum(b2 / b1, 1) - in_b2 * np.maximum(b1 / b2, 1)
            self.p[lanes] = np.clip(self.p[lanes] + step, 0, self.lanes.slots[lanes])
            where[members[in_b1 | in_b2]] = _RETURNING

    def on_insert(self, at: Ints) -> None:
        where = self.where.reshape(-1)
        where[at] = np.where(where[at] == _RETURNING, _T2, _T1)
        lanes = at // self.lanes.width
        slots = self.lanes.slots[lanes]
        t1, t2, b1, b2 = ((self.where[lanes] == part).sum(axis=1) for part in (_T1, _T2, _B1, _B2))
        self._forget(lanes[(t1 + b1 > slots) & (b1 > 0)], _B1)
        self._forget(lanes[(t1 + t2 + b1 + b2 > 2 * slots) & (t1 + b1 <= slots) & (b2 > 0)], _B2)

    def _forget(self, lanes: Ints, ghosts: int) -> None:
        if len(lanes):
            oldest = np.where(self.where[lanes] == ghosts, self.forgotten[lanes], _LATER).argmin(axis=1)
            self.where[lanes, oldest] = _AWAY

    def on_evict(self, at: Ints) -> None:
        where = self.where.reshape(-1)
        where[at] = _EVICTED[where[at]]
        self._evictions += 1
        self.forgotten.reshape(-1)[at] = self._evictions

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        where, recency = self.where[lanes], self.recency[lanes]
        in_t1 = where == _T1
        surplus = in_t1.sum(axis=1) - self.p[lanes]
        # T1 gives up while it is longer than p; what comes back from B2 takes from it even when it is just as long.
        first = np.where(self._from_b2[lanes], np.floor(surplus) + 1, np.ceil(surplus)).astype(np.int64)
        oldest = np.sort(np.where(in_t1, recency, _LATER), axis=1)
        last = np.take_along_axis(oldest, np.clip(first - 1, 0, self.lanes.width - 1)[:, None], axis=1)
        late = in_t1 & ((recency > last) | (first <= 0)[:, None])
        return recency + _GROUP * ((where == _T2) + 2 * late.astype(np.int64))
