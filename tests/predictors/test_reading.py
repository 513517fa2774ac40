"""Predictors that go by what a pass reads: by hand, and with the contract of the beginning of a pass."""

from __future__ import annotations

from dataclasses import replace
from math import log

import numpy as np
import pytest
from workload import EXPERTS, LAYERS, TOP_K, event, make, random_events, random_trace, said, trace_of

from cache.traces.trace import PADDING, Trace
from cache.types import ExpertKey, Opening, Phase, RoutingEvent, before_first
from predictors.base import Predictor, make_predictor
from predictors.evaluate import evaluate

K = ExpertKey
READERS = ["token-ids", "path", "expert-map"]


def opening(*ids: int, embedding: object = None, step: int = 0) -> RoutingEvent:
    told = None if embedding is None else np.array(embedding, np.float32)
    return before_first(0, step, Phase.DECODE, Opening(ids, told))


def with_inputs(trace: Trace, ids: object = None, embeddings: object = None) -> Trace:
    """`trace`, whose tokens are `ids`, by default some of five."""
    rng = np.random.default_rng(3)
    read = rng.integers(0, 5, trace.num_tokens) if ids is None else np.array(ids)
    table = rng.standard_normal((5, 6)) if embeddings is None else np.array(embeddings)
    return replace(trace, ids=read.astype(np.int32), embeddings=table[read].astype(np.float16))


def reader(name: str) -> Predictor:
    """One that has learnt from a profile with inputs."""
    return make_predictor(name, LAYERS, EXPERTS, with_inputs(random_trace()))


@pytest.mark.parametrize("name", READERS)
def test_what_a_pass_reads_is_asked_for_and_predictions_count_from_before_its_first_layer(name: str) -> None:
    first, second = reader(name), reader(name)
    assert first.reads
    for number, seen in enumerate(random_events(90)):
        if seen.layer == 0:
            begins = opening(number % 5, 1, embedding=[1, 0, 0, number, 0, 0], step=seen.step)
            begins = begins._replace(sequence=seen.sequence, phase=seen.phase)
            first.begin(begins)
            second.begin(begins)
            predictions = first.predict(LAYERS)
            assert predictions == second.predict(LAYERS) and predictions
            assert all(p.key.layer == p.lead_layers - 1 for p in predictions)
            assert len({p.key for p in predictions}) == len(predictions)
            assert first.predict(1) == [p for p in predictions if p.lead_layers == 1]
            assert all(0 <= p.probability <= 1 and type(p.probability) is float for p in predictions)
        first.observe(seen)
        second.observe(seen)
        assert first.predict(LAYERS) == second.predict(LAYERS)


@pytest.mark.parametrize("name", READERS)
def test_reading_is_forgotten_with_the_sequences(name: str) -> None:
    used, fresh = reader(name), reader(name)
    for seen in random_events(30):
        if seen.layer == 0:
            used.begin(opening(1, embedding=[0, 1, 0, 0, 2, 0], step=seen.step)._replace(sequence=seen.sequence))
        used.observe(seen)
    used.reset()
    assert used.predict(LAYERS) == fresh.predict(LAYERS) == []
    for predictor in (used, fresh):
        predictor.begin(opening(2, embedding=[1, 2, 0, 0, 0, 0]))
    assert used.predict(LAYERS) == fresh.predict(LAYERS)


def test_a_token_goes_where_it_went() -> None:
    """Token 7 went to experts 0 and 1 once, token 9 to 2 and 3 in three passes: of all uses a quarter and three."""
    predictor = make("token-ids(doubt=1.0)")
    for step, (token, experts) in enumerate([(7, (0, 1)), *[(9, (2, 3))] * 3]):
        predictor.begin(opening(token, step=step))
        for layer in range(LAYERS):
            predictor.observe(event(layer, experts, step=step))
    predictor.begin(opening(7, step=4))
    seven, nine = (1 + 0.25) / 2, 0.75 / 2
    assert said(predictor) == {K(0, 0): seven, K(0, 1): seven, K(0, 2): nine, K(0, 3): nine}
    assert [p.lead_layers for p in predictor.predict(2)] == [1] * 4 + [2] * 4
    predictor.begin(opening(8, step=5))  # which never came
    assert said(predictor) == {K(0, 2): 0.75, K(0, 3): 0.75, K(0, 0): 0.25, K(0, 1): 0.25}
    predictor.begin(opening(7, 7, 8, step=6))  # any of three
    any_of_them = 1 - (1 - seven) ** 2 * 0.75
    assert said(predictor)[K(0, 0)] == any_of_them
    predictor.observe(event(0, (0, 1, 2), step=6, tokens=(3, 2, 1)))
    assert {p.key.layer for p in predictor.predict(LAYERS)} == {1, 2}


def test_the_latest_tokens_are_remembered() -> None:
    predictor = make("token-ids(tokens=2)")
    for step, token in enumerate([1, 2, 1, 3]):  # token 2 goes for token 3
        predictor.begin(opening(token, step=step))
        for layer in range(LAYERS):
            predictor.observe(event(layer, (token, 0), step=step))
    shares = {}
    for step, token in enumerate([1, 2], 4):
        predictor.begin(opening(token, step=step))
        shares[token] = {p.key.expert: p.probability for p in predictor.predict(1)}[token]
    assert shares[1] == pytest.approx((2 + 0.5) / 3) and shares[2] == pytest.approx(0.25)


def test_a_profile_says_where_tokens_went() -> None:
    trace = trace_of(((0, 1),) * LAYERS, ((2, 3),) * LAYERS, ((4, 5),) * LAYERS, ((0, 2),) * LAYERS)
    trace = replace(with_inputs(trace, ids=[4, 4, 4, 3]), phase=np.array([1, 1, PADDING, 1], np.uint8))
    predictor = make("token-ids", trace)
    predictor.begin(opening(4))
    expected = {0: (1 + 2 / 3) / 3, 2: (1 + 2 / 3) / 3, 1: (1 + 1 / 3) / 3, 3: (1 + 1 / 3) / 3}
    assert said(predictor) == {K(0, expert): share for expert, share in expected.items()}
    without = make("token-ids", replace(trace, ids=None, embeddings=None))
    without.begin(opening(4))
    assert said(without) == {K(0, 0): 2 / 3, K(0, 2): 2 / 3, K(0, 1): 1 / 3, K(0, 3): 1 / 3}


def test_a_path_is_said_at_once_and_for_all_layers() -> None:
    """The first step goes from odds of 0, a half, by 1/2 over two inputs: the embedding, of length 1, and the constant.
    When the same is read again both speak for what was needed, on top of the share of 2 in 8 experts."""
    predictor = make("path(rate=1.0)")
    predictor.begin(opening(1, embedding=[3, 4]))
    for layer in range(LAYERS):
        predictor.observe(event(layer, (layer, 7)))
    predictor.begin(opening(1, embedding=[6, 8], step=1))
    predictions = predictor.predict(LAYERS)
    needed = {p.key: p.probability for p in predictions if p.key.expert in (p.key.layer, 7)}
    expected = 1 / (1 + np.exp(-(log(2 / 6) + 0.25 + 0.25)))
    assert needed == {K(layer, e): pytest.approx(expected, rel=1e-5) for layer in range(LAYERS) for e in (layer, 7)}
    predictor.observe(event(0, (5, 6), step=1))
    assert predictor.predict(1) == [p._replace(lead_layers=1) for p in predictions if p.key.layer == 1]


def test_a_path_without_openings_begins_with_the_first_layer() -> None:
    predictor = make("path")
    for step in range(60):
        for layer in range(LAYERS):
            predictor.observe(event(layer, (step % 2, 2 + step % 2), step=step))
    predictor.observe(event(0, (0, 2), step=60))
    assert {p.key.expert for p in predictor.predict(1) if p.probability > 0.8} == {0, 2}
    assert {p.key.layer for p in predictor.predict(LAYERS)} == {1, 2}


def test_before_the_first_layer_maps_are_found_by_what_passes_read() -> None:
    """The third pass read what this one does, and went to experts 4 and 5; by trajectory the first is nearest."""
    trace = trace_of(((0, 1),) * LAYERS, ((2, 3),) * LAYERS, ((4, 5),) * LAYERS)
    trace = with_inputs(trace, ids=[0, 1, 2], embeddings=np.eye(5, 6))
    predictor = make("expert-map(nearest=1)", trace)
    predictor.begin(opening(2, embedding=[0, 0.1, 0.9, 0, 0, 0]))
    assert {p.key for p in predictor.predict(1)} == {K(0, 4), K(0, 5)}
    assert predictor.similarity == pytest.approx(0.9 / 0.82**0.5, rel=1e-3)
    predictor.observe(event(0, (0, 1)))
    assert {p.key for p in predictor.predict(1)} == {K(1, 0), K(1, 1)}
    plain = make("expert-map(nearest=1)", replace(trace, ids=None, embeddings=None))
    assert not plain.reads


def test_evaluation_counts_what_is_said_before_the_first_layer() -> None:
    """Each token goes to its own two experts: its first layer is known before it only by the token."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, 200)
    experts = np.stack([2 * ids, 2 * ids + 1], 1)[:, None].repeat(LAYERS, 1)
    trace = Trace.from_arrays(experts, np.full(experts.shape, 0.5), [0, 200], num_experts=EXPERTS)
    told = evaluate(make("token-ids", with_inputs(trace, ids=ids)), with_inputs(trace, ids=ids), 1).as_dict()
    assert told["by_layer"]["1"] == [1.0, 1.0, 1.0] and told["targets"] == 200 * LAYERS
    blind = evaluate(make("token-ids", with_inputs(trace, ids=ids)), trace, 1).as_dict()
    assert blind["coverage"]["1"] == 0


def test_top_k_is_known_of_a_profile() -> None:
    """Before the first layer a pass has no event to go by."""
    predictor = reader("expert-map")
    predictor.begin(opening(1, embedding=[1, 0, 0, 0, 0, 0]))
    assert 0 < len(predictor.predict(1)) <= 2 * TOP_K
