"""A predictor for stress tests: it names other experts every time, and is mostly wrong."""

from __future__ import annotations

from random import Random

from cache.types import ExpertKey, RoutingEvent
from predictors.base import Prediction, Predictor


class Wild(Predictor):
    """Names a few experts of the next layers at random; what it named before is forgotten."""

    name = "wild"

    def reset(self) -> None:
        super().reset()
        self._random = Random(0)
        self._said: list[Prediction] = []

    def observe(self, event: RoutingEvent) -> None:
        self._said = []
        for lead in range(1, self.num_layers + 1):
            layer = (event.layer + lead) % self.num_layers
            for expert in sorted(self._random.sample(range(self.num_experts), 2)):
                self._said.append(Prediction(ExpertKey(layer, expert), 0.9, lead))

    def predict(self, depth: int) -> list[Prediction]:
        return [prediction for prediction in self._said if prediction.lead_layers <= depth]
