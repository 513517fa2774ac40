"""The experts that a profile used most, and no others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy, register
from cache.traces.profiles import use_counts
from cache.traces.trace import Trace


@register
class Static(EvictionPolicy):
    """Keep the experts that most forward passes of a profile used; others are fetched and not kept, once it is full.

    No two experts rank alike: of equal counts the first one stays. Source: folklore; among published systems the
    frequency placement of Fiddler, arXiv 2402.07033.
    """

    name = "static"
    bypass = True
    learns = True
    steady = True

    def learn(self, profile: Trace) -> None:
        counts = use_counts(profile).reshape(-1)
        ranks = np.empty_like(counts)
        ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))[::-1]
        self._ranks = self.lanes.spread(ranks)

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        return self._ranks[lanes]
