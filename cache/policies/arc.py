"""Adaptive replacement cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints, Touch
from cache.policy import EvictionPolicy, register

_AWAY, _T1, _T2, _B1, _B2, _RETURNING = range(6)
_LISTS = np.array([[_T1], [_T2], [_B1], [_B2]], np.int8)
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

    def resize(self, slots: Ints) -> None:
        super().resize(slots)
        self.p = np.minimum(self.p, slots)
        while True:  # what both memories are too long by is forgotten, the oldest first
            t1, t2, b1, b2 = self._lengths(np.arange(self.lanes.count))
            long = (t1 + b1 > slots) & (b1 > 0)
            full = ~long & (t1 + t2 + b1 + b2 > 2 * slots) & (b2 > 0)
            if not (long | full).any():
                return
            self._forget(long.nonzero()[0], _B1)
            self._forget(full.nonzero()[0], _B2)

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        where = self.where.reshape(-1)
        found = where[touch.at]
        self._from_b2[touch.lanes] = (found == _B2).any(axis=1)
        where[touch.at[found == _T1]] = _T2
        ghosts = (found == _B1) | (found == _B2)
        if ghosts.any():
            rows = ghosts.any(axis=1).nonzero()[0]
            self._adapt(rows + touch.lanes.start, touch.at[rows][:, ghosts.any(axis=0)])

    def _adapt(self, lanes: Ints, at: Ints) -> None:
        where = self.where.reshape(-1)
        _, _, b1, b2 = self._lengths(lanes)
        for members in at.T:
            in_b1, in_b2 = where[members] == _B1, where[members] == _B2
            grow = in_b1 * np.maximum(b2 / np.maximum(b1, 1), 1)
            shrink = in_b2 * np.maximum(b1 / np.maximum(b2, 1), 1)
            self.p[lanes] = np.maximum(np.minimum(self.p[lanes] + grow, self.lanes.slots[lanes]) - shrink, 0)
            where[members[in_b1 | in_b2]] = _RETURNING
            b1, b2 = b1 - in_b1, b2 - in_b2

    def _lengths(self, lanes: Ints) -> Ints:
        """Of T1, T2, B1 and B2, [4, lanes]."""
        lengths: Ints = (self.where[lanes] == _LISTS[:, None]).sum(axis=2)
        return lengths

    def on_insert(self, at: Ints) -> None:
        where = self.where.reshape(-1)
        where[at] = np.where(where[at] == _RETURNING, _T2, _T1)
        lanes = at // self.lanes.width
        t1, t2, b1, b2 = self._lengths(lanes)
        slots = self.lanes.slots[lanes]
        long = t1 + b1 > slots
        self._forget(lanes[long & (b1 > 0)], _B1)
        self._forget(lanes[~long & (t1 + t2 + b1 + b2 > 2 * slots) & (b2 > 0)], _B2)

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
        last = oldest[np.arange(len(oldest)), np.clip(first, 0, self.lanes.width) - 1]
        late = in_t1 & (recency > np.where(first > 0, last, -1)[:, None])
        turns: Ints = recency + _GROUP * ((where == _T2) + 2 * late.astype(np.int64))
        return turns
