"""Which experts are worth the least: the lowest priority; among equals the least recently used, then the lowest column.

The same order twice: lazily for one lane, as the live cache asks, and for many lanes at once, as a replay asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints

_TAKEN = np.iinfo(np.int64).max


def weakest_first(priorities: NDArray[Any], recency: Ints, candidates: NDArray[np.bool_]) -> Iterator[int]:
    """The columns marked in `candidates`, the weakest first; all arrays are [width].

    Lazy, since mostly one is wanted: O(candidates) for each column taken.
    """
    columns = candidates.nonzero()[0]
    values = priorities[columns].astype(np.float64, copy=False)
    for _ in range(len(columns)):
        index = values.argmin()
        ties = (values == values[index]).nonzero()[0]
        if len(ties) > 1:
            index = ties[recency[columns[ties]].argmin()]
        yield int(columns[index])
        # Not infinity, which a priority may be: what is taken leaves the arrays.
        values[index:-1] = values[index + 1 :]
        columns[index:-1] = columns[index + 1 :]
        values, columns = values[:-1], columns[:-1]


def weakest(
    priorities: NDArray[Any], recency: Ints, candidates: NDArray[np.bool_], counts: Ints
) -> Iterator[tuple[Ints, Ints]]:
    """The `counts` [n] weakest candidates of every lane, round by round: (lanes, columns), a victim each.

    `priorities`, `recency` and `candidates` are [n, width]. Round i serves the lanes that give up more than i. Every lane
    must have as many candidates as it gives up.
    """
    rows = counts.nonzero()[0]
    if not len(rows):
        return
    every = len(rows) == len(counts)
    left = counts if every else counts[rows]
    candidates = candidates.copy() if every else candidates[rows]
    values = priorities if every else priorities[rows]
    used = recency if every else recency[rows]
    while True:
        keys = np.where(candidates, values, np.inf)
        lowest = keys.min(axis=1)
        ties = keys == lowest[:, None]
        ties &= candidates
        columns = np.where(ties, used, _TAKEN).argmin(axis=1)
        yield rows, columns
        more = left > 1
        if not more.any():
            return
        candidates[np.arange(len(rows)), columns] = False
        rows, left, candidates, values, used = rows[more], left[more] - 1, candidates[more], values[more], used[more]
