"""Which experts are worth the least: the lowest priority; among equals the least recently used, then the lowest column.

The same order twice: lazily for one lane, as the live cache asks, and for many lanes at once, as a replay asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.lanes import Ints

_LATER = np.iinfo(np.int64).max


def weakest_first(priorities: NDArray[Any], recency: Ints, candidates: NDArray[np.bool_]) -> Iterator[int]:
    """The columns marked in `candidates`, the weakest first; all arrays are [width].

    Lazy, since mostly one is wanted: O(candidates) for each column taken. Unmarks what it yields. Raises PolicyError
    for priorities of which one is not a number.
    """
    columns = candidates.nonzero()[0]
    if not len(columns):
        return
    values = priorities[columns].astype(np.float64, copy=False)
    index = values.argmin()
    while (lowest := values.item(index)) < inf:
        values[index] = inf  # taken
        following = values.argmin()
        if values.item(following) == lowest:
            values[index] = lowest
            ties = (values == lowest).nonzero()[0]
            index = ties[recency[columns[ties]].argmin()]
            values[index] = inf
            following = values.argmin()
        column = columns.item(index)
        candidates[column] = False
        yield column
        index = following
    _refuse_nan(lowest)
    # What is left was never taken and is worth infinitely much.
    columns = candidates.nonzero()[0]
    yield from columns[np.argsort(recency[columns], kind="stable")].tolist()


def weakest(
    priorities: NDArray[Any], recency: Ints, candidates: NDArray[np.bool_], counts: Ints
) -> Iterator[tuple[Ints, Ints]]:
    """The `counts` [m] weakest candidates of every lane, round by round: (lanes, columns), one of each lane.

    `candidates` are [m, width], `priorities` and `recency` [n, width], where m is a multiple of n: several sets of
    candidates, one behind the other, may be ranked by the same values. Round i serves the lanes that give up more
    than i. Every lane must have as many candidates as it gives up.
    """
    rows = counts.nonzero()[0]
    left = counts[rows]
    ranked = rows % len(priorities)
    keys = np.where(candidates[rows], priorities[ranked], np.inf)
    used = recency[ranked]
    while len(rows):
        columns = keys.argmin(axis=1)
        every = np.arange(len(rows))
        lowest = keys[every, columns]
        _refuse_nan(lowest.min())
        ties = keys == lowest[:, None]
        tied = np.count_nonzero(ties, axis=1) > 1
        if tied.any():
            among = ties[tied]
            if np.isinf(lowest).any():  # a priority may be infinite; what is no candidate still does not count
                among &= candidates[rows[tied]]
            columns[tied] = np.where(among, used[tied], _LATER).argmin(axis=1)
        yield rows, columns
        keys[every, columns] = np.inf
        more = left > 1
        rows, left, keys, used = rows[more], left[more] - 1, keys[more], used[more]


def _refuse_nan(lowest: float) -> None:
    # The lowest of several numbers is not a number if one of them is not.
    if lowest != lowest:
        raise PolicyError("an eviction policy gave a priority that is not a number: fix it")
