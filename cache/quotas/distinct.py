"""By how many experts a layer uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.quota import Quota, even, proportional, register
from cache.traces.profiles import activation_matrices
from cache.traces.trace import Trace
from cache.types import RoutingEvent

SEQUENCES = 1000
"""Of a profile, at most, in which uses are counted."""


@register
class Distinct(Quota):
    """In proportion to the number of distinct experts that a sequence uses in a layer, on average.

    With a profile, these are its sequences. Without one, they are those that the model has read and written so far, and
    before the first prompt the division is even.
    Source: He et al., ExpertFlow, arXiv 2410.17954, which predicts that number for every batch, as `plec` does.
    """

    name = "distinct"
    _learnt: NDArray[np.float64] | None = None

    def learn(self, profile: Trace) -> None:
        self._learnt = (activation_matrices(profile, SEQUENCES) > 0).sum(axis=2).mean(axis=0)
        self.adapts = False

    def reset(self) -> None:
        super().reset()
        self._used = np.zeros((self.num_layers, self.num_experts), np.bool_)  # by the sequence under way
        self._before = np.zeros(self.num_layers)  # the numbers of all sequences before it, added up
        self._sequence: int | None = None

    def observe(self, event: RoutingEvent) -> None:
        if event.sequence != self._sequence:
            self._before += self._used.sum(axis=1)
            self._used[:] = False
            self._sequence = event.sequence
        self._used[event.layer, list(event.experts)] = True

    def divide(self, total: int) -> list[int]:
        # Sums are as good as means: only their proportions count.
        used = self._before + self._used.sum(axis=1) if self._learnt is None else self._learnt
        if not used.all():
            return even(total, self.num_layers, self.num_experts)
        return proportional(total, used.tolist(), self.num_experts)
