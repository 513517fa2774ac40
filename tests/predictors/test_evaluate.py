"""What `evaluate` counts, on traces whose recall is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import batched_trace
from workload import EXPERTS, LAYERS, TOP_K, random_trace, trace_of

from cache.traces.passes import rank_ahead
from cache.traces.trace import DECODE, PREFILL, Trace
from cache.types import ExpertKey, RoutingEvent
from predictors.base import Prediction, Predictor, find_predictor, make_predictor, names
from predictors.evaluate import evaluate


class Fixed(Predictor):
    """Says 0, 1, 2, 3, ... of every layer it is asked for up to two ahead, with these probabilities."""

    said = (0.95, 0.55, 0.15)

    def observe(self, event: RoutingEvent) -> None:
        self.layer = event.layer

    def predict(self, depth: int) -> list[Prediction]:
        return [
            Prediction(ExpertKey((self.layer + lead) % self.num_layers, expert), probability, lead)
            for lead in range(1, min(depth, 2) + 1)
            for expert, probability in enumerate(self.said)
        ]


def test_recall_precision_and_calibration_by_hand() -> None:
    # Two sequences. Layer 0 always has both of the first two, layer 1 one of them, layer 2 the third alone.
    token = ((0, 1), (0, 7), (2, 7))
    trace = trace_of(token, token, token, token, offsets=(0, 3, 4))
    found = evaluate(Fixed(LAYERS, EXPERTS), trace, depth=3).as_dict()
    # Targets at distance 1: all 12 events but the first of either sequence. Layer 0 twice, the others four times.
    assert found["targets"] == 10
    assert found["recall"]["1"] == {"K": (4 + 4) / 20, "K+2": (4 + 4 + 4) / 20, "2K": (4 + 4 + 4) / 20}
    assert found["precision"]["1"] == {"K": 8 / 20, "K+2": 12 / 30, "2K": 12 / 30}
    # At distance 2 the second events are none either; 3 was never predicted.
    assert found["recall"]["2"] == {"K": (4 + 2) / 16, "K+2": (4 + 2 + 4) / 16, "2K": (4 + 2 + 4) / 16}
    assert found["recall"]["3"] == {"K": 0.0, "K+2": 0.0, "2K": 0.0}
    assert found["precision"]["3"] == {"K": None, "K+2": None, "2K": None}
    assert found["coverage"] == {"1": 1.0, "2": 1.0, "3": 0.0}
    assert found["by_layer"]["1"] == [1.0, 0.5, 0.0]
    bins = found["calibration"]["1"]
    assert [one["predictions"] for one in bins] == [0, 10, 0, 0, 0, 10, 0, 0, 0, 10]
    assert bins[9] == {"predictions": 10, "probability": pytest.approx(0.95), "came_true": 0.6}
    assert bins[1]["came_true"] == 0.4
    assert bins[0] == {"predictions": 0, "probability": None, "came_true": None}
    assert (found["predictor"], found["params"], found["prefill"]) == ("Fixed", {}, None)
    json.dumps(found, allow_nan=False)


def test_prompts_are_counted_apart_and_by_what_their_unions_need() -> None:
    experts = np.array([[(0, 1), (0, 7)], [(2, 1), (0, 1)], [(0, 1), (5, 6)]])  # a prompt of two tokens, one more
    trace = Trace.from_arrays(
        experts, np.full(experts.shape, 0.5), [0, 3], num_experts=8, step=[0, 0, 1], phase=[PREFILL, PREFILL, DECODE]
    )
    found = evaluate(Fixed(2, 8), trace, depth=1).as_dict()
    assert found["prefill"]["targets"] == 1  # layer 1, which needs 0, 1 and 7
    assert found["prefill"]["recall"]["1"] == {"K": 2 / 3, "K+2": 2 / 3, "2K": 2 / 3}
    assert found["targets"] == 2
    assert found["by_layer"]["1"] == [1.0, 0.0]


def test_the_oracle_is_always_right_and_none_never_says_anything() -> None:
    trace = random_trace()
    oracle = evaluate(make_predictor("oracle", LAYERS, EXPERTS, trace), trace).as_dict()
    for distance in "123":
        assert set(oracle["recall"][distance].values()) == set(oracle["precision"][distance].values()) == {1.0}
        assert oracle["calibration"][distance][9]["came_true"] == 1.0
    none = evaluate(make_predictor("none", LAYERS, EXPERTS), trace).as_dict()
    assert none["recall"]["1"]["K"] == 0 and none["coverage"]["1"] == 0


def test_what_gates_said_is_found_in_the_trace() -> None:
    """Right in the first place at distance 1, and in the second at distance 2."""
    trace = random_trace()
    predicted = np.zeros((trace.num_tokens, LAYERS, 2, TOP_K), np.uint8)
    for layer in range(LAYERS - 1):
        right = trace.experts[:, layer + 1]
        wrong = [next(e for e in range(EXPERTS) if e not in needed) for needed in right.tolist()]
        predicted[:, layer, 0] = np.stack([right[:, 0], wrong], axis=1)
    for layer in range(LAYERS - 2):
        right = trace.experts[:, layer + 2]
        wrong = [next(e for e in range(EXPERTS) if e not in needed) for needed in right.tolist()]
        predicted[:, layer, 1] = np.stack([wrong, right[:, 1]], axis=1)
    recorded = Trace.from_arrays(
        trace.experts, trace.weights, trace.sequence_offsets, num_experts=EXPERTS, predicted=predicted
    )
    found = evaluate(make_predictor("cross-layer-gate", LAYERS, EXPERTS), recorded).as_dict()
    assert found["by_layer"] == {"1": [0.0, 0.5, 0.5], "2": [0.0, 0.0, 0.5], "3": [0.0, 0.0, 0.0]}
    assert found["precision"]["1"]["K"] == 0.5
    # Soon the first place is believed, and the second is not.
    calibration = found["calibration"]["1"]
    assert sum(one["predictions"] for one in calibration[9:]) > 90
    assert all(one["came_true"] in (None, 0.0) for one in calibration[:3])


@pytest.mark.parametrize("name", names())
def test_batches_padding_and_prompts_in_chunks_are_predicted(name: str) -> None:
    trace = batched_trace(layers=4)
    profile = trace if find_predictor(name).can_learn else None
    found = evaluate(make_predictor(name, 4, 6, profile), trace).as_dict()
    assert found["targets"] > 0 and found["prefill"]["targets"] > 0
    if name not in ("none", "cross-layer-gate", "token-ids"):  # the trace has neither gates' opinions nor tokens
        assert found["coverage"]["1"] > 0
    json.dumps(found, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_candidates_of_several_tokens_are_ranked_by_how_early_they_are_named(data: st.DataObject) -> None:
    tokens, distances = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    width, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 6))
    rows = st.permutations(range(experts)).map(lambda order: order[:width])
    predicted = np.array([[data.draw(rows) for _ in range(distances)] for _ in range(tokens)])
    found = rank_ahead(predicted)
    assert len(found) == distances
    for distance, ranked in enumerate(found):
        points = [0] * experts
        for token in range(tokens):
            for position in range(width):
                points[predicted[token, distance, position]] += width - position
        expected = sorted((e for e in range(experts) if points[e]), key=lambda e: (-points[e], e))
        assert list(ranked) == (predicted[0, distance].tolist() if tokens == 1 else expected)
