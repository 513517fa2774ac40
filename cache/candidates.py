"""Which experts of a cache may be evicted, and in what order.

The order is the policy's, or that of a ranking that somebody gives for a while. Experts that are in use stay; favoured
ones go last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy
from cache.selection import weakest_first
from cache.types import ExpertKey


class Candidates:
    """The experts of a cache that are marked as evictable, lane by lane, with their bytes."""

    def __init__(self, policy: EvictionPolicy) -> None:
        lanes = policy.lanes
        self.in_use: Sequence[ExpertKey] = ()
        """Not to be evicted for now."""
        self.favoured: Collection[ExpertKey] = ()
        """To be evicted only where nothing else may go."""
        self.marked_bytes = [0] * lanes.count
        """Of each lane, those in use included."""
        self._policy = policy
        self._width = lanes.width
        self._experts = lanes.experts
        keys = [ExpertKey(layer, e) for layer in range(policy.num_layers) for e in range(lanes.experts)]
        self._keys_of = [keys[first : first + lanes.width] for first in range(0, len(keys), lanes.width)]
        self.ranking: NDArray[np.float64] | None = None
        """By lane, what orders everything in the policy's stead."""
        # One byte an expert, seen as Python's bytes and as NumPy's bools: each is fast where the other is not.
        self._marks = bytearray(lanes.count * lanes.width)
        self._rows = np.frombuffer(self._marks, np.bool_).reshape(lanes.count, lanes.width)

    def mark(self, index: int, nbytes: int, evictable: bool) -> None:
        """Expert `index`, of `nbytes`, may be evicted from now on, or may not."""
        self._marks[index] = evictable
        self.marked_bytes[index // self._width] += nbytes if evictable else -nbytes

    def marked(self, lane: int) -> set[ExpertKey]:
        """What may be evicted from `lane`, but for what is in use."""
        return {self._keys_of[lane][column] for column in self._rows[lane].nonzero()[0].tolist()}

    def rank(self, values: NDArray[np.float64] | None) -> None:
        """Until the next call `values` [layers, experts] order everything, not the policy; None: the policy does."""
        self.ranking = None if values is None else values.reshape(-1, self._width)

    def among_highest(self, index: int, count: int) -> bool:
        """Whether expert `index` is among the `count` highest of its lane. False without a ranking, and for a tie."""
        if self.ranking is None:
            return False
        lane, column = divmod(index, self._width)
        values = self.ranking[lane]
        return int(np.count_nonzero(values >= values[column])) <= count

    def weakest(
        self, lane: int, protected: Iterable[ExpertKey], also: Collection[ExpertKey] = ()
    ) -> Iterator[ExpertKey]:
        """What may be evicted from `lane` and is not `protected`, and those of `also`, the weakest first; lazily."""
        candidates = self._rows[lane].copy()
        self._set(candidates, lane, protected, False)
        if self.in_use:
            self._set(candidates, lane, self.in_use, False)
        order = self._order(candidates, lane, also)
        return map(self._keys_of[lane].__getitem__, order)

    def _order(self, candidates: NDArray[np.bool_], lane: int, also: Collection[ExpertKey]) -> Iterator[int]:
        """The columns of `lane` that are marked in `candidates`, and those of `also`; favoured ones last."""
        if self.favoured:
            favoured = np.zeros_like(candidates)
            self._set(favoured, lane, self.favoured, True)
            favoured &= candidates
            if favoured.any():
                candidates &= ~favoured
                self._set(candidates, lane, also, True)
                return chain(self._by_worth(candidates, lane), self._by_worth(favoured, lane))
        if also:
            self._set(candidates, lane, also, True)
        return self._by_worth(candidates, lane)

    def _by_worth(self, candidates: NDArray[np.bool_], lane: int) -> Iterator[int]:
        if self.ranking is None:
            return self._policy.eviction_order(candidates, lane)
        return weakest_first(self.ranking[lane], self._policy.recency[lane], candidates)

    def _set(self, columns: NDArray[np.bool_], lane: int, keys: Iterable[ExpertKey], value: bool) -> None:
        """Mark those of `keys` that are in `lane`."""
        experts, width, first = self._experts, self._width, lane * self._width
        for layer, expert in keys:
            column = layer * experts + expert - first
            if 0 <= column < width:
                columns[column] = value
