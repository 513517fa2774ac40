"""Fitted while running: which experts a later layer needs, from those that the latest layers used."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor
from predictors.ranking import Tokens, of_any_token, ranked, tokens_ahead


@dataclass(slots=True)
class _Forecast:
    """What was expected of one layer, and from what."""

    distance: int
    rows: NDArray[np.int64]
    amounts: NDArray[np.float32] | None
    weights: NDArray[np.float32]
    """Those of `rows`, which nobody changes until the layer's event comes."""
    need: NDArray[np.float32]
    """The probability that one token needs each expert, [E]."""


class Regression(Predictor):
    """A logistic regression for each target layer and distance, one step of gradient descent at every event.

    Its inputs are the experts of the latest `context` layers, counted back across passes, and those that the target
    layer used a pass before. Of an event of several tokens both inputs and targets are the shares of the tokens, so
    that what is estimated is always one token's need.
    """

    context: int = 1
    reach: int = 1
    """The farthest distance."""
    rate: float = 1.0
    """The step, which all inputs that are present share."""

    _trained: Mapping[tuple[int, int], NDArray[np.float32]] = MappingProxyType({})

    def wanted(self, layer: int, lead: int) -> bool:
        """Whether the layer `lead` after `layer` is to be predicted from there."""
        return True

    def learn(self, profile: Trace) -> None:
        self.reset()
        for event in routing_events(profile):
            self.observe(event)
        self._trained = self._weights

    def reset(self) -> None:
        super().reset()
        # By distance and target layer, [(context + 1) * E + 1, E]: the inputs' weights, and last a constant.
        self._weights = {place: weights.copy() for place, weights in self._trained.items()}
        self._tokens = Tokens()
        self._forget()

    def _forget(self) -> None:
        self._event: RoutingEvent | None = None
        self._count = 1
        # The latest layers, as many as a pass has, the last one first: experts, and their shares if not all are 1.
        self._history: deque[tuple[NDArray[np.int64], NDArray[np.float32] | None]] = deque(maxlen=self.num_layers)
        self._expected: deque[list[_Forecast]] = deque()  # of the coming layers, the next one first

    def observe(self, event: RoutingEvent) -> None:
        last = self._event
        if last is None or last.sequence != event.sequence or (last.layer + 1) % self.num_layers != event.layer:
            self._forget()
        self._event = event
        self._count = self._tokens.of(event)
        experts = np.array(event.experts, np.int64)
        shares = None if self._count == 1 else np.array(event.tokens, np.float32) / np.float32(self._count)
        for forecast in self._expected.popleft() if self._expected else ():
            self._correct(forecast, self._weights[forecast.distance, event.layer], experts, shares)
        self._history.appendleft((experts, shares))
        for distance in range(1, self.reach + 1):
            if len(self._expected) < distance:
                self._expected.append([])
            if self.wanted(event.layer, distance):
                self._expected[distance - 1].append(self._forecast(event.layer, distance))

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        found: list[Prediction] = []
        for lead, expected in enumerate(self._expected, 1):
            # The forecast made at this event, if there was one, is the last of those for that layer.
            if lead > depth or not expected or expected[-1].distance != lead:
                continue
            tokens = tokens_ahead(event, self._count, lead, self.num_layers)
            need = of_any_token(expected[-1].need, tokens)
            found += ranked((event.layer + lead) % self.num_layers, lead, need, 2 * len(event.experts))
        return found

    def _forecast(self, layer: int, distance: int) -> _Forecast:
        place = distance, (layer + distance) % self.num_layers
        if place not in self._weights:
            shape = (self.context + 1) * self.num_experts + 1, self.num_experts
            self._weights[place] = np.zeros(shape, np.float32)
        rows, amounts = self._inputs(distance)
        weights = self._weights[place].take(rows, axis=0)
        # Added up row by row, in order: a matrix product may do it differently from run to run.
        odds = np.add.reduce(weights if amounts is None else weights * amounts[:, None], axis=0)
        share = self._tokens.share(self.num_experts)
        odds += math.log(share / (1 - share))
        return _Forecast(distance, rows, amounts, weights, 1 / (1 + np.exp(-np.maximum(odds, -80))))

    def _inputs(self, distance: int) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """The rows of the weights that count, and by how much each does if not by 1."""
        places = [self._history[back] for back in range(min(self.context, len(self._history)))]
        groups = list(range(len(places)))
        if len(self._history) > self.num_layers - distance:
            places.append(self._history[self.num_layers - distance])
            groups.append(self.context)
        rows = [experts + group * self.num_experts for group, (experts, _) in zip(groups, places, strict=True)]
        rows.append(np.array([(self.context + 1) * self.num_experts]))
        if all(shares is None for _, shares in places):
            return np.concatenate(rows), None
        amounts = [np.ones(len(experts), np.float32) if shares is None else shares for experts, shares in places]
        return np.concatenate(rows), np.concatenate([*amounts, np.ones(1, np.float32)])

    def _correct(
        self,
        forecast: _Forecast,
        weights: NDArray[np.float32],
        experts: NDArray[np.int64],
        shares: NDArray[np.float32] | None,
    ) -> None:
        """One step towards what was really needed, from the weights that made the forecast."""
        step = -forecast.need
        step[experts] += 1 if shares is None else shares
        amounts = forecast.amounts
        if amounts is None:
            step *= self.rate / len(forecast.rows)
            weights[forecast.rows] = forecast.weights + step
        else:
            step *= self.rate / float((amounts**2).sum())
            weights[forecast.rows] = forecast.weights + amounts[:, None] * step
