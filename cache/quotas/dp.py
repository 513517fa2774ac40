"""The most hits, by dynamic programming."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from cache.quota import Quota, even, register
from cache.traces.miss_ratio import MissRatioCurve, RunningCurve, lru_miss_ratio_curve
from cache.traces.trace import Trace
from cache.types import RoutingEvent

_NEVER = np.iinfo(np.int64).min // 2


@register
class DP(Quota):
    """The division that would have had the most hits under LRU, found by dynamic programming over layers.

    With a profile, it is that of the profile, whose sequences begin with empty caches. Without one, it is that of all
    that the model has used so far, and even before the first prompt.
    Source: Zhong et al., AdapMoE, arXiv 2408.10284, whose costs are a formula of prefetch accuracy; these are measured.
    """

    name = "dp"
    _learnt: MissRatioCurve | None = None

    def learn(self, profile: Trace) -> None:
        self._learnt = lru_miss_ratio_curve(profile, cold=True)
        self.adapts = False

    def reset(self) -> None:
        super().reset()
        self._running = RunningCurve(self.num_layers, self.num_experts)

    def observe(self, event: RoutingEvent) -> None:
        self._running.observe(event)

    def divide(self, total: int) -> list[int]:
        curve = self._learnt or self._running.curve
        if not curve.accesses.all():
            return even(total, self.num_layers, self.num_experts)
        return most_hits(total, curve.hits)


def most_hits(total: int, hits: NDArray[np.int64]) -> list[int]:
    """The division with the most hits, where `hits` [L, E + 1] are those of a layer's cache of 0 to E experts; among
    equals the most even one.

    The most hits with j slots in the first i layers, over all that the last of them can get. O(L total E).
    """
    num_layers, num_experts = hits.shape[0], hits.shape[1] - 1
    total = min(total, num_layers * num_experts)
    # A hit is worth more than any evenness.
    worth = hits * (num_layers * num_experts**2 + 1) - np.arange(num_experts + 1) ** 2
    best = np.full(total + 1, _NEVER)
    best[0] = 0
    taken = np.zeros((num_layers, total + 1), np.int64)
    for layer in range(num_layers):
        padded = np.concatenate([np.full(num_experts, _NEVER), best])
        # [k, j]: with k slots here, and j - k in the layers before.
        reached = sliding_window_view(padded, total + 1)[::-1] + worth[layer][:, None]
        taken[layer] = reached.argmax(axis=0)
        best = np.maximum(reached.max(axis=0), _NEVER)
    slots = []
    for layer in reversed(range(num_layers)):
        slots.append(int(taken[layer, total]))
        total -= slots[-1]
    return slots[::-1]
