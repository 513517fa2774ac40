"""The ensemble comes to believe its better parts."""

from __future__ import annotations

import pytest
from workload import LAYERS, event, log_odds, make, said, sigmoid

from cache.errors import PolicyError
from cache.types import ExpertKey, RoutingEvent
from predictors.base import Prediction, Predictor


class Stubborn(Predictor):
    """Always says the same: expert 0 with .9, expert 1 with .2."""

    def observe(self, event: RoutingEvent) -> None:
        self.layer = event.layer

    def predict(self, depth: int) -> list[Prediction]:
        return [
            Prediction(ExpertKey((self.layer + lead) % self.num_layers, expert), probability, lead)
            for lead in range(1, depth + 1)
            for expert, probability in ((0, 0.9), (1, 0.2))
        ]


class Contrary(Stubborn):
    """The other way round, and only one layer ahead."""

    def predict(self, depth: int) -> list[Prediction]:
        layer = (self.layer + 1) % self.num_layers
        return [Prediction(ExpertKey(layer, expert), p, 1) for expert, p in ((1, 0.9), (0, 0.2))]


PARTS = '"test_ensemble:Stubborn", "test_ensemble:Contrary"'


def test_an_ensemble_starts_with_the_mean_of_its_parts_and_comes_to_believe_the_better_one() -> None:
    both = make(f"ensemble(parts=({PARTS}))")
    both.observe(event(0, (1, 7)))
    mean = sigmoid((log_odds(0.9) + log_odds(0.2)) / 2)
    assert said(both, 2) == {
        ExpertKey(1, 0): mean,
        ExpertKey(1, 1): mean,
        ExpertKey(2, 0): 0.9,  # only one of them speaks of that layer
        ExpertKey(2, 1): 0.2,
    }
    for step in range(200):
        for layer in range(LAYERS):
            both.observe(event(layer, (1, 7), step=step))
    probabilities = {p.key.expert: p.probability for p in both.predict(1)}
    assert probabilities[1] > 0.9 and probabilities[0] < 0.1
    assert {p.key.expert: p.probability > 0.5 for p in both.predict(2) if p.lead_layers == 2} == {1: True, 0: False}


def test_an_ensemble_asks_for_what_its_parts_ask_for() -> None:
    assert make("ensemble").looks_ahead and not make("ensemble").learns
    assert not make('ensemble(parts=("frequency", "transition"))').looks_ahead
    with pytest.raises(PolicyError, match='"ensemble" learns from a recorded trace'):
        make('ensemble(parts=("frequency", "expert-map"))')
    with pytest.raises(PolicyError, match="oracle asks for the future"):
        make('ensemble(parts=("oracle", "frequency"))')
    with pytest.raises(PolicyError, match="a tuple of names is needed"):
        make('ensemble(parts="frequency")')
    with pytest.raises(PolicyError, match='no predictor is called "gate"'):
        make('ensemble(parts=("gate",))')
