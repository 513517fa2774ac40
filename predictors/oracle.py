"""Knows the trace that runs: what a perfect predictor would say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import batches, running_order
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.ranking import layers_ahead, ranked_each


@register
class Oracle(Predictor):
    """Every expert that the trace says will be needed, at probability 1. The profile IS the trace that runs.

    It follows by counting: the n-th sequence observed is the trace's n-th, or its n-th batch, and an event of m tokens
    advances by m of them, so that a prompt may be read in other chunks than were recorded. How many tokens the next
    pass has is not known: one a sequence, or as many as this one where it decodes. Beyond the end of the recorded
    sequence it says nothing.
    """

    name = "oracle"
    causal = False
    learns = True
    _trace: Trace | None = None

    def learn(self, profile: Trace) -> None:
        self._trace = profile
        self._groups = list(batches(profile, np.arange(profile.num_sequences)))

    def reset(self) -> None:
        super().reset()
        self._event: RoutingEvent | None = None
        self._group = -1
        self._tokens = np.zeros(0, np.int64)  # of the group, in running order
        self._first = self._count = 0  # those of this pass

    def observe(self, event: RoutingEvent) -> None:
        trace, last = self._trace, self._event
        assert trace is not None  # `make_predictor` refuses it without
        if last is None or last.sequence != event.sequence:
            self._group += 1
            known = self._group < len(self._groups)
            self._tokens = running_order(trace, self._groups[self._group])[0] if known else np.zeros(0, np.int64)
            self._first = 0
        elif last.step != event.step:
            self._first += self._count
        if last is None or (last.sequence, last.step) != (event.sequence, event.step):
            self._count = max(1, sum(event.tokens) // trace.top_k)
        self._event = event

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        following = self._first + self._count
        alike = self._count if event.phase is Phase.DECODE else self._sequences()
        leads = range(1, min(depth, self.num_layers) + 1)
        layers = layers_ahead(event.layer, self.num_layers)[: len(leads)]
        needed = [
            self._needed(layer, *((self._first, self._count) if layer > event.layer else (following, alike)))
            for layer in layers
        ]
        return ranked_each(layers, leads, np.stack(needed), self.num_experts)

    def _sequences(self) -> int:
        """How many run together."""
        return len(self._groups[self._group]) if self._group < len(self._groups) else 1

    def _needed(self, layer: int, first: int, count: int) -> NDArray[np.float64]:
        """1 for every expert that the tokens in question go to, [E]."""
        assert self._trace is not None
        needed = np.zeros(self.num_experts)
        needed[self._trace.experts[self._tokens[first : first + count], layer]] = 1
        return needed
