"""Nothing is there before it is needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.types import ExpertKey
from offload.decide.placements.base import Placement, register


@register
class Empty(Placement):
    """Caches fill as experts are used: the model starts at once, and misses at first."""

    name = "empty"

    def order(self, counts: NDArray[np.int64] | None) -> list[ExpertKey]:
        return []
