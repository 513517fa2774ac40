"""Segmented LRU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints, Touch
from cache.policy import EvictionPolicy, register

_SEGMENT = 2**48  # beyond every place in a segment


@register
class SLRU(EvictionPolicy):
    """LRU lists of equal size, one above the other: a use lifts an expert into the next, and the lowest loses first.

    A list that is too long passes its least recently used on to the head of the one below. The lowest has what the
    division leaves over. An event lifts all its members before lists are shortened.
    Source: Karedla, Love and Wherry, Computer 27(3), 1994, for two lists; Huang et al., SOSP 2013, for four.
    """

    name = "slru"

    @dataclass(frozen=True)
    class Params:
        """The lists, and where new experts start."""

        segments: int = 4
        """How many lists."""
        fill: bool = True
        """While a cache fills, start in the lowest list that has room, as libCacheSim does; else in the lowest."""

        def __post_init__(self) -> None:
            if self.segments < 1:
                raise ValueError(f"segments is {self.segments}, not 1 or more")

    def reset(self) -> None:
        super().reset()
        self.segment = self.zeros(np.int64)
        """1 for the lowest list; 0 for an expert that is not there."""
        self.place = self.zeros(np.int64)
        """Ascends from a list's tail to its head."""
        self._next_place = self.lanes.width
        self._numbers = np.arange(1, self.params.segments + 1)
        self._share_out()

    def resize(self, slots: Ints) -> None:
        super().resize(slots)
        self._share_out()
        self._shorten(np.arange(self.lanes.count))

    def _share_out(self) -> None:
        """Divide every lane's slots among its lists."""
        upper = self.lanes.slots // self.params.segments
        self._room = np.tile(upper[:, None], self.params.segments)
        self._room[:, 0] += self.lanes.slots - upper * self.params.segments

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        at, segment = touch.at, self.segment.reshape(-1)
        found = segment[at]
        segment[at] = np.where(found > 0, np.minimum(found + 1, self.params.segments), 0)
        count = at.shape[1]
        self.place.reshape(-1)[at] = np.arange(self._next_place, self._next_place + count)
        self._next_place += count
        self._shorten(np.arange(self.lanes.count)[touch.lanes])

    def on_insert(self, at: Ints) -> None:
        segment: Ints | int = 1
        if self.params.fill:
            lanes = at // self.lanes.width
            # The lowest with room; where none has any, argmax of nothing is the lowest.
            segment = (self._lengths(lanes) < self._room[lanes]).argmax(axis=1) + 1
        self.segment.reshape(-1)[at] = segment
        self.place.reshape(-1)[at] = self._next_place
        self._next_place += 1

    def on_evict(self, at: Ints) -> None:
        self.segment.reshape(-1)[at] = 0

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        line: Ints = self.segment[lanes] * _SEGMENT + self.place[lanes]
        return line

    def _lengths(self, lanes: Ints) -> Ints:
        """Experts in each list, [lanes, segments]."""
        lengths: Ints = (self.segment[lanes, None] == self._numbers[:, None]).sum(axis=2)
        return lengths

    def _shorten(self, lanes: Ints) -> None:
        """Let lists that are too long pass their tails down.

        Since a tail becomes the head of the list below, the lists in one line keep their order: only the borders move.
        """
        lengths = self._lengths(lanes)
        longer = (lengths[:, 1:] > self._room[lanes, 1:]).any(axis=1)
        if not longer.any():
            return
        lanes, lengths = lanes[longer], lengths[longer]
        for upper in range(self.params.segments - 1, 0, -1):
            surplus = np.maximum(lengths[:, upper] - self._room[lanes, upper], 0)
            lengths[:, upper] -= surplus
            lengths[:, upper - 1] += surplus
        width = self.lanes.width
        line = np.argsort(self.segment[lanes] * _SEGMENT + self.place[lanes], axis=1)
        borders = width - np.cumsum(lengths[:, ::-1], axis=1)  # where each list starts in the line, the uppermost first
        segment = (np.arange(width)[:, None] >= borders[:, None, :]).sum(axis=2)
        rows = lanes[:, None]
        self.segment[rows, line] = segment
        self.place[rows, line] = np.arange(width)
