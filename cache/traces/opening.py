"""What each pass reads, as `RoutingEvent.opening` says it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cache.types import Opening


def openings(
    ids: NDArray[np.int32], means: NDArray[np.float32] | None, sizes: NDArray[np.int64]
) -> Callable[[int], Opening]:
    """By pass, of passes of `sizes` [P] tokens: their `ids` [N], and the mean of their embeddings [P, D] if known."""
    read = ids.tolist()
    ends = np.cumsum(sizes).tolist()

    def opening(index: int) -> Opening:
        first = ends[index] - int(sizes[index])
        return Opening(tuple(read[first : ends[index]]), None if means is None else means[index])

    return opening
