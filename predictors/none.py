"""Predicts nothing: every transfer is on demand."""

from __future__ import annotations

from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor, register


@register
class NoPredictor(Predictor):
    """The baseline that every other predictor has to beat."""

    name = "none"

    def observe(self, event: RoutingEvent) -> None:
        pass

    def predict(self, depth: int) -> list[Prediction]:
        return []
