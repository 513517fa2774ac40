"""Looks through the gates of the next layers with the hidden state of this one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.types import Phase, RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.ranking import keys_of, made

_STRENGTH = 8.0  # how many observations of a layer the rate over all layers counts as


@dataclass(frozen=True)
class CrossLayerGateParams:
    """`extra`: candidates beyond as many as the last event needed; by default as many again."""

    extra: int | None = None

    def __post_init__(self) -> None:
        if self.extra is not None and self.extra < 0:
            raise ValueError(f"extra is {self.extra}, negative")


@register
class CrossLayerGate(Predictor):
    """What the next gates say of the present hidden state, `RoutingEvent.ahead`, the likeliest first.

    Layers change the hidden state little, so a later gate chooses nearly the same experts for this layer's input as for
    its own. How nearly is learnt while running: for either phase, every target layer, distance and position in the
    list, how often the expert there was really needed. That rate is the probability; a layer with few observations
    leans on all layers together, and those on what the papers report. The gates of the next pass see a token that is
    not known yet, so nothing is said beyond the last layer.

    Sources: Eliseev and Mazur, mixtral-offloading, arXiv 2312.17238; Tang et al., HOBBIT, 2411.01433; Fang et al.,
    Fate, 2502.12224.
    """

    name = "cross-layer-gate"
    Params = CrossLayerGateParams
    looks_ahead = True

    def reset(self) -> None:
        super().reset()
        self._event: RoutingEvent | None = None
        self._said: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # target layer: distances and lists of this pass
        self._hits: dict[int, NDArray[np.float64]] = {}  # distance: [phase, L + 1, E], the last row of all layers
        self._seen: dict[int, NDArray[np.float64]] = {}

    def observe(self, event: RoutingEvent) -> None:
        last = self._event
        if last is None or (last.sequence, last.step) != (event.sequence, event.step) or last.layer >= event.layer:
            self._said.clear()
        needed = set(event.experts)
        phase = int(event.phase is Phase.DECODE)
        for distance, said in self._said.pop(event.layer, ()):
            if distance not in self._hits:
                shape = 2, self.num_layers + 1, self.num_experts
                self._hits[distance], self._seen[distance] = np.zeros(shape), np.zeros(shape)
            right = np.fromiter(map(needed.__contains__, said), np.float64, len(said))
            for layer in (event.layer, -1):
                self._hits[distance][phase, layer, : len(said)] += right
                self._seen[distance][phase, layer, : len(said)] += 1
        for distance, said in enumerate(event.ahead, 1):
            if event.layer + distance < self.num_layers:
                self._said.setdefault(event.layer + distance, []).append((distance, said))
        self._event = event

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        found: list[Prediction] = []
        needed = len(event.experts)
        most = needed + (needed if self.params.extra is None else self.params.extra)
        reach = min(depth, len(event.ahead), self.num_layers - 1 - event.layer)
        for distance, said in enumerate(event.ahead[:reach], 1):
            said = said[:most]
            rates = self._rates(int(event.phase is Phase.DECODE), event.layer + distance, distance, needed, len(said))
            order = (-rates).argsort(kind="stable")
            keys = keys_of(event.layer + distance, self.num_experts)
            found += made([keys[said[position]] for position in order.tolist()], rates[order].tolist(), distance)
        return found

    def _rates(self, phase: int, layer: int, distance: int, needed: int, count: int) -> NDArray[np.float64]:
        """How often the expert at each of `count` positions was needed."""
        rates = np.full(count, 0.2)
        rates[:needed] = 0.8
        if distance in self._hits:
            for row in (-1, layer):
                hits, seen = self._hits[distance][phase, row, :count], self._seen[distance][phase, row, :count]
                rates = (hits + _STRENGTH * rates) / (seen + _STRENGTH)
        return rates
