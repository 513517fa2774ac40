"""Fitted while running: which experts a later layer needs, from those that the latest layers used."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor
from predictors.ranking import Tokens, layers_ahead, needed_ahead, ranked_each


@dataclass(slots=True)
class _Forecast:
    """What was expected of one layer, and from what."""

    distance: int
    rows: NDArray[np.int64]
    """Of all weights, those that counted."""
    amounts: NDArray[np.float32] | None
    """By how much each did, if not by 1."""
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

    _trained: NDArray[np.float32] | None = None

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
        layers, num_inputs = range(self.num_layers), (self.context + 1) * self.num_experts + 1
        pairs = [(layer, lead) for layer in layers for lead in range(1, self.reach + 1) if self.wanted(layer, lead)]
        # Of each layer, how far ahead it looks, and which row of the weights is the first of those for that.
        self._first_rows: list[dict[int, int]] = [{} for _ in layers]
        for place, (layer, lead) in enumerate(pairs):
            self._first_rows[layer][lead] = place * num_inputs
        # [places * num_inputs, E]: of each place the inputs' weights, and last a constant. Zeros take no memory yet.
        shape = len(pairs) * num_inputs, self.num_experts
        self._weights = np.zeros(shape, np.float32) if self._trained is None else self._trained.copy()
        self._constant = np.array([num_inputs - 1])
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
            self._correct(forecast, experts, shares)
        self._history.appendleft((experts, shares))
        while len(self._expected) < self.reach:
            self._expected.append([])
        if self._first_rows[event.layer]:
            for forecast in self._forecasts(self._first_rows[event.layer]):
                self._expected[forecast.distance - 1].append(forecast)

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        # The forecast made at this event, if there was one, is the last of those for that layer.
        latest = [expected[-1] for expected in islice(self._expected, depth) if expected]
        made = [forecast for forecast in latest if forecast.distance in self._first_rows[event.layer]]
        if not made:
            return []
        leads = [forecast.distance for forecast in made]
        needs = np.array([forecast.need for forecast in made])
        needed = needed_ahead(event, self._count, leads, self.num_layers, needs)
        layers = layers_ahead(event.layer, self.num_layers)
        return ranked_each([layers[lead - 1] for lead in leads], leads, needed, 2 * len(event.experts))

    def _forecasts(self, first_rows: Mapping[int, int]) -> list[_Forecast]:
        """Of the layers so far ahead, whose weights begin at these rows."""
        history, experts = self._history, self.num_experts
        recent = [history[back] for back in range(min(self.context, len(history)))]
        shared = np.concatenate([used + group * experts for group, (used, _) in enumerate(recent)])
        inputs = []
        for distance, first in first_rows.items():
            places, rows = recent, [shared]
            if len(history) > self.num_layers - distance:
                own = history[self.num_layers - distance]
                places = [*recent, own]
                rows.append(own[0] + self.context * experts)
            inputs.append((distance, np.concatenate([*rows, self._constant]) + first, _amounts(places)))
        # All at once, since calls cost more than numbers.
        weights = self._weights.take(np.concatenate([chosen for _, chosen, _ in inputs]), axis=0)
        odds = np.empty((len(inputs), self.num_experts), np.float32)
        blocks, end = [], 0
        for (_, chosen, amounts), row in zip(inputs, odds, strict=True):
            block = weights[end : (end := end + len(chosen))]
            # Added up row by row, in order: a matrix product may do it differently from run to run.
            np.add.reduce(block if amounts is None else block * amounts[:, None], axis=0, out=row)
            blocks.append(block)
        share = self._tokens.share(self.num_experts)
        odds += math.log(share / (1 - share))
        needs = 1 / (1 + np.exp(-np.maximum(odds, -80)))
        return [_Forecast(*each, block, need) for each, block, need in zip(inputs, blocks, needs, strict=True)]

    def _correct(
        self,
        forecast: _Forecast,
        experts: NDArray[np.int64],
        shares: NDArray[np.float32] | None,
    ) -> None:
        """One step towards what was really needed, from the weights that made the forecast."""
        step = -forecast.need
        step[experts] += 1 if shares is None else shares
        amounts = forecast.amounts
        if amounts is None:
            step *= self.rate / len(forecast.rows)
            self._weights[forecast.rows] = forecast.weights + step
        else:
            step *= self.rate / float((amounts**2).sum())
            self._weights[forecast.rows] = forecast.weights + amounts[:, None] * step


def _amounts(places: Sequence[tuple[NDArray[np.int64], NDArray[np.float32] | None]]) -> NDArray[np.float32] | None:
    """By how much each input counts, the constant last; None: all by 1."""
    if all(shares is None for _, shares in places):
        return None
    amounts = [np.ones(len(experts), np.float32) if shares is None else shares for experts, shares in places]
    return np.concatenate([*amounts, np.ones(1, np.float32)])
