"""What the tokens of a pass say ahead of the layers to come, as one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ahead = tuple[tuple[int, ...], ...]
"""By distance, experts, the likeliest first."""


def rank_ahead(predicted: NDArray[np.integer[Any]]) -> Ahead:
    """What a pass's tokens say ahead, as one list for each distance: [tokens, D, P] -> D times up to E experts.

    `predicted` are each token's candidates, the likeliest first. A candidate counts the more, the earlier its token
    names it; ties by id. Of a single token the order is its own.
    """
    if len(predicted) == 1:
        return tuple(map(tuple, predicted[0].tolist()))
    width = predicted.shape[2]
    points = np.broadcast_to(np.arange(width, 0, -1), (len(predicted), width)).ravel()
    ranked = []
    for distance in range(predicted.shape[1]):
        total = np.bincount(predicted[:, distance].ravel(), points)
        order = np.argsort(-total, kind="stable")
        ranked.append(tuple(order[: np.count_nonzero(total)].tolist()))
    return tuple(ranked)
