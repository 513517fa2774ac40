"""The contract of every predictor, and the one that predicts nothing."""

from __future__ import annotations

import random

import pytest
from traces import random_trace

from cache.errors import PolicyError
from cache.types import Phase, RoutingEvent
from predictors.base import Predictor, make_predictor, names

LAYERS, EXPERTS = 3, 8
PROFILE = random_trace(lengths=(40, 30, 20), layers=LAYERS, experts=EXPERTS)


def events(count: int) -> list[RoutingEvent]:
    rng = random.Random(0)
    made = []
    for i in range(count):
        step, layer = divmod(i, LAYERS)
        made.append(
            RoutingEvent(0, step, layer, Phase.DECODE, tuple(rng.sample(range(EXPERTS), 2)), (0.4, 0.6), (1, 1))
        )
    return made


@pytest.mark.parametrize("name", names())
def test_predictions_are_well_formed_and_repeatable(name: str) -> None:
    first, second = (make_predictor(name, LAYERS, EXPERTS, PROFILE) for _ in range(2))
    for event in events(300):
        first.observe(event)
        second.observe(event)
        predictions = first.predict(LAYERS)
        assert predictions == first.predict(LAYERS) == second.predict(LAYERS)
        assert len({prediction.key for prediction in predictions}) == len(predictions)
        for prediction in predictions:
            assert 0 <= prediction.key.layer < LAYERS
            assert 0 <= prediction.key.expert < EXPERTS
            assert 0 <= prediction.probability <= 1
            assert prediction.lead_layers >= 1


@pytest.mark.parametrize("name", names())
def test_reset_forgets_the_sequences(name: str) -> None:
    used, fresh = (make_predictor(name, LAYERS, EXPERTS, PROFILE) for _ in range(2))
    for event in events(60):
        used.observe(event)
    used.reset()
    assert used.predict(LAYERS) == fresh.predict(LAYERS)


def test_none_predicts_nothing() -> None:
    predictor = make_predictor("none", LAYERS, EXPERTS)
    assert isinstance(predictor, Predictor)
    for event in events(30):
        predictor.observe(event)
        assert predictor.predict(LAYERS) == []


def test_an_unknown_predictor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r'no predictor is called "fate": choose one of .*none'):
        make_predictor("fate", LAYERS, EXPERTS)
