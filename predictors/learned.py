"""A forecast of every expert's use, learned from recorded routing: one ridge regression for each layer and distance.

In the spirit of ProMoE (arXiv:2410.22134), whose small networks see hidden states: this sees what a trace has, and so
is trained and compared without the model. On a trace of gpt-oss-20b neither logistic regressions nor networks with a
hidden layer of 128 found more experts than these sums do (docs/LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.errors import PolicyError
from cache.traces.trace import Trace
from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.forecast import POINTS, Regressions, State, named
from predictors.ranking import predicted
from predictors.training import fit


@dataclass(frozen=True)
class LearnedParams:
    """`file` is what `offload train-predictor` wrote; without one, a profile is learned from: `depth` layers ahead of
    the last `window`. Experts less likely than `floor` are not named."""

    file: str = ""
    floor: float = 0.01
    depth: int = 3
    window: int = 6


@register
class Learned(Predictor):
    """The share p of a pass's tokens that an expert will get, by ridge regression; needed by n tokens: 1 - (1 - p)^n.

    Names experts as many layers ahead as were learned, and on into the next pass.
    """

    name = "learned"
    learns = True
    Params = LearnedParams

    def __init__(self, num_layers: int, num_experts: int, params: LearnedParams | None = None) -> None:
        params = params or LearnedParams()
        self._learned: Regressions | None = None
        if params.file:
            self._use(Regressions.read(Path(params.file)), num_layers, num_experts, params.file)
        self.learns = not params.file
        super().__init__(num_layers, num_experts, params)

    def learn(self, profile: Trace) -> None:
        if self.learns:
            found, _ = fit([profile], depth=self.params.depth, window=self.params.window)
            self._use(found, self.num_layers, self.num_experts, profile.name)

    def reset(self) -> None:
        super().reset()
        self._event: RoutingEvent | None = None
        if self._learned is not None:
            self._state = State(self.num_layers, self.num_experts, self._learned.window)

    def observe(self, event: RoutingEvent) -> None:
        assert self._learned is not None
        shares = np.zeros(self.num_experts, np.float32)
        shares[list(event.experts)] = np.array(event.tokens) * (self._learned.top_k / sum(event.tokens))
        self._state.update(event.layer, shares)
        self._event = event

    def predict(self, depth: int) -> list[Prediction]:
        event, learned = self._event, self._learned
        if event is None or learned is None:
            return []
        predictions: list[Prediction] = []
        tokens = sum(event.tokens) / learned.top_k
        for distance in range(1, min(depth, self._weights.shape[1], self.num_layers) + 1):
            ahead = named(event.ahead, distance, self.num_experts, learned.top_k) if learned.ahead else None
            features = self._state.features(event.layer, distance, ahead)
            seen = np.flatnonzero(features)  # few are not 0: one row of the weights each
            share = features.take(seen) @ self._weights[event.layer, distance - 1].take(seen, axis=0)
            probability = 1 - (1 - np.interp(share, POINTS, learned.curves[distance - 1])) ** tokens
            order = np.argsort(-share, kind="stable")[: np.count_nonzero(probability >= self.params.floor)]
            predictions += predicted((event.layer + distance) % self.num_layers, distance, order, probability)
        return predictions

    def _use(self, learned: Regressions, layers: int, experts: int, name: str) -> None:
        if learned.shape != (layers, experts):
            has = "{} layers of {} experts".format(*learned.shape)
            raise PolicyError(f"{name} was learned from a model of {has}, not {layers} of {experts}")
        self._learned = learned
        self._weights = learned.weights.astype(np.float32)
        self.looks_ahead = learned.ahead
