"""The contract that every predictor keeps, and how they are found."""

from __future__ import annotations

import pytest
from workload import EXPERTS, LAYERS, event, random_events, random_trace

from cache.errors import PolicyError, TraceError
from predictors.base import Predictor, find_predictor, make_predictor, names

WITH_PROFILE = [(name, True) for name in names() if find_predictor(name).can_learn]
CASES = [*((name, False) for name in names() if not find_predictor(name).learns), *WITH_PROFILE]


def make(name: str, profiled: bool) -> Predictor:
    return make_predictor(name, LAYERS, EXPERTS, random_trace() if profiled else None)


@pytest.mark.parametrize(("name", "profiled"), CASES)
def test_predictions_are_well_formed_and_repeatable(name: str, profiled: bool) -> None:
    first, second = (make(name, profiled) for _ in range(2))
    assert first.predict(LAYERS) == []
    for seen in random_events(300):
        first.observe(seen)
        second.observe(seen)
        predictions = first.predict(LAYERS)
        assert predictions == first.predict(LAYERS) == second.predict(LAYERS)
        assert len({prediction.key for prediction in predictions}) == len(predictions)
        assert predictions == sorted(predictions, key=lambda p: (p.lead_layers, -p.probability))
        for prediction in predictions:
            assert prediction.key.layer == (seen.layer + prediction.lead_layers) % LAYERS
            assert 0 <= prediction.key.expert < EXPERTS
            assert 0 <= prediction.probability <= 1
            assert 1 <= prediction.lead_layers <= LAYERS
            assert type(prediction.probability) is float and type(prediction.key.expert) is int


@pytest.mark.parametrize(("name", "profiled"), CASES)
def test_a_shallow_look_is_the_beginning_of_a_deep_one(name: str, profiled: bool) -> None:
    predictor = make(name, profiled)
    for seen in random_events(60):
        predictor.observe(seen)
    deep = predictor.predict(LAYERS)
    for depth in range(1, LAYERS):
        assert predictor.predict(depth) == [p for p in deep if p.lead_layers <= depth]


@pytest.mark.parametrize(("name", "profiled"), CASES)
def test_reset_forgets_the_sequences(name: str, profiled: bool) -> None:
    used, fresh = (make(name, profiled) for _ in range(2))
    for seen in random_events(70):
        used.observe(seen)
    used.reset()
    assert used.predict(LAYERS) == fresh.predict(LAYERS) == []
    for seen in random_events(50, seed=1):
        used.observe(seen)
        fresh.observe(seen)
        assert used.predict(LAYERS) == fresh.predict(LAYERS)


@pytest.mark.parametrize(("name", "profiled"), CASES)
def test_a_model_of_one_layer_is_a_model(name: str, profiled: bool) -> None:
    profile = None
    if profiled:
        several = random_trace()
        profile = type(several).from_arrays(
            several.experts[:, :1], several.weights[:, :1], several.sequence_offsets, num_experts=EXPERTS
        )
    predictor = make_predictor(name, 1, EXPERTS, profile)
    for seen in random_events(40, layers=1):
        predictor.observe(seen)
        assert all(p.lead_layers == 1 for p in predictor.predict(1))


@pytest.mark.parametrize("name", [name for name in names() if find_predictor(name).learns])
def test_what_learns_asks_for_a_profile(name: str) -> None:
    with pytest.raises(PolicyError, match=f'predictor "{name}" learns from a recorded trace: name one'):
        make_predictor(name, LAYERS, EXPERTS)


@pytest.mark.parametrize("name", [name for name, _ in WITH_PROFILE])
def test_the_profile_of_another_model_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match=r"has 3 layers of 8 experts, not 4 of 8: name a profile of the same model"):
        make_predictor(name, 4, EXPERTS, random_trace())


def test_none_predicts_nothing() -> None:
    predictor = make_predictor("none", LAYERS, EXPERTS)
    predictor.observe(event(0, (1, 2)))
    assert predictor.predict(LAYERS) == []


def test_an_unknown_predictor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match='no predictor is called "fate": choose one of '):
        make_predictor("fate", LAYERS, EXPERTS)
