"""What is asked of each token of a pass, before the pass becomes an event: by the live runtime and by a replay.

An event says which experts a pass needs, and with which total weights. Some rules judge an expert token by token, by
what else that token goes to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Routed(NamedTuple):
    """Where the T tokens of a pass go in one layer, K experts each, in any order."""

    layer: int
    experts: NDArray[np.int64]
    """[T, K]."""
    weights: Floats
    """[T, K]: the router's."""
    continues: bool
    """Whether the pass goes on with replies, a token or several guesses a sequence, instead of reading prompts."""


@dataclass(frozen=True, slots=True)
class ByToken:
    """What a rule wants: `keep` says which pairs of a token and an expert remain [T, K], None for all of them.

    `before`: whether events say of each expert how much weight is before it. `renormalise`: whether what remains of a
    token takes over the weight of the rest, which events do not show.
    """

    keep: Callable[[Routed], Mask | None] | None = None
    before: bool = False
    renormalise: bool = False


def weight_before(experts: NDArray[np.integer[Any]], weights: NDArray[np.floating[Any]]) -> Floats:
    """experts and weights [..., K] of tokens -> the share of its token's weight that stronger experts have [..., K].

    Of equals the higher id counts as the stronger, as in events.
    """
    order = np.lexsort((experts, weights), axis=-1)[..., ::-1]
    falling = np.take_along_axis(weights, order, -1).astype(np.float64)
    before = np.zeros_like(falling)
    np.cumsum(falling[..., :-1], -1, out=before[..., 1:])
    total = before[..., -1:] + falling[..., -1:]
    shares = np.empty_like(before)
    np.put_along_axis(shares, order, before / np.where(total > 0, total, 1.0), -1)
    return shares


def least(cells: NDArray[np.integer[Any]], values: Floats, count: int) -> Floats:
    """[count]: the least of the `values` [N] that belong to each of the cells 0 to count - 1; infinite for none."""
    found = np.full(count, np.inf)
    np.minimum.at(found, cells, values)
    return found


def kept_pairs(
    keep: Callable[[Routed], Mask | None],
    experts: NDArray[np.unsignedinteger[Any]],
    weights: NDArray[np.floating[Any]],
    sizes: NDArray[np.int64],
    continues: Mask,
) -> Mask:
    """experts and weights [N, L, K] of the passes of `sizes` [P] tokens -> which pairs `keep` keeps [N, L, K]."""
    kept = np.ones(experts.shape, bool)
    ends = np.cumsum(sizes).tolist()
    for start, end, goes_on in zip([0, *ends], ends, continues.tolist(), strict=False):
        ids, own = experts[start:end].astype(np.int64), weights[start:end].astype(np.float64)
        for layer in range(experts.shape[1]):
            found = keep(Routed(layer, ids[:, layer], own[:, layer], goes_on))
            if found is not None:
                kept[start:end, layer] = found
    return kept
