"""Every expert alike: the predictor of those who ask no router."""

from __future__ import annotations

from workload import EXPERTS, LAYERS, event

from predictors.base import make_predictor


def test_all_experts_of_the_next_layers_are_expected_alike() -> None:
    predictor = make_predictor("every", LAYERS, EXPERTS)
    predictor.observe(event(LAYERS - 2, (3, 1)))
    found = predictor.predict(2)
    assert [prediction.key for prediction in found] == [(layer, e) for layer in (LAYERS - 1, 0) for e in range(EXPERTS)]
    assert {prediction.probability for prediction in found} == {2 / EXPERTS}
