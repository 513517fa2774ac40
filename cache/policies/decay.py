"""Ours, without training: a sum of frequencies that fade at several rates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Touch
from cache.policy import EvictionPolicy, register


@dataclass(frozen=True)
class DecayParams:
    """`rates`: the share of each count that is forgotten in a forward pass."""

    rates: tuple[float, ...] = (0.15, 0.02)

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate <= 1 for rate in self.rates):
            raise ValueError(f"rates are {self.rates}, not in (0, 1]")


@register
class Decay(EvictionPolicy):
    """Evict the expert with the lowest sum of exponentially decayed use counts, a fast one and a slow one; ties by LRU.

    The fast count is recency that one stray use does not upset, the slow one frequency that follows a change of topic.
    Source: this project. On gpt-oss-20b no other rule made of an expert's own history did better (docs/policies.md).
    """

    name = "decay"
    Params = DecayParams

    def reset(self) -> None:
        super().reset()
        rates = self.params.rates
        self._counts = [(1 - rate, counts, counts.reshape(-1)) for rate in rates for counts in [self.zeros()]]

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        for keep, counts, flat in self._counts:
            counts[touch.lanes, touch.columns] *= keep
            flat[touch.at] += 1

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        first, *others = (counts[lanes] for _, counts, _ in self._counts)
        total: NDArray[np.float64] = first.copy()
        for counts in others:
            total += counts
        return total
