"""Quotas that go by what a profile, or a running model, uses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import zipf_markov

from cache.counting.counting import count
from cache.quota import even, make_quota, proportional
from cache.quotas.dp import most_hits
from cache.traces.miss_ratio import RunningCurve, lru_miss_ratio_curve
from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 4), experts=st.integers(1, 4), total=st.integers(0, 18))
def test_dp_is_as_good_as_trying_everything(seed: int, layers: int, experts: int, total: int) -> None:
    rng = np.random.default_rng(seed)
    hits = np.cumsum(rng.integers(0, 3, (layers, experts + 1)), axis=1)  # not concave: greedy would fail

    def merit(division: tuple[int, ...]) -> tuple[int, int]:
        reached = sum(int(curve[n]) for curve, n in zip(hits, division, strict=True))
        return reached, -sum(n * n for n in division)

    divisions = itertools.product(range(experts + 1), repeat=layers)
    best = max(merit(d) for d in divisions if sum(d) == min(total, layers * experts))
    assert merit(tuple(most_hits(total, hits))) == best


def test_dp_has_the_hits_that_the_curves_promise_and_no_fewer_than_even() -> None:
    trace = zipf_markov()
    curve = lru_miss_ratio_curve(trace, cold=True).hits
    slots = make_quota("dp", trace.num_layers, trace.num_experts, trace).slots(40)
    divided, evenly = count(trace, "lru", [slots, even(40, trace.num_layers, trace.num_experts)])
    assert divided.hits == sum(curve[layer, n] for layer, n in enumerate(slots))
    assert divided.hits >= evenly.hits


def test_what_runs_has_the_curve_of_its_trace() -> None:
    trace = zipf_markov()
    running, quota = RunningCurve(4, 32), make_quota("dp", 4, 32)
    for event in routing_events(trace):
        running.observe(event)
        quota.observe(event)
    whole = lru_miss_ratio_curve(trace, cold=False)
    assert np.array_equal(running.curve.hits, whole.hits) and np.array_equal(running.curve.accesses, whole.accesses)
    assert quota.slots(40) == most_hits(40, whole.hits)


def event(layer: int, experts: tuple[int, ...], sequence: int = 0, step: int = 0) -> RoutingEvent:
    n = len(experts)
    return RoutingEvent(sequence, step, layer, Phase.DECODE, experts, (1 / n,) * n, (1,) * n)


def test_distinct_follows_how_many_experts_a_sequence_uses() -> None:
    # Layer 0 goes to one expert in the first sequence and to three in the second, layer 1 to four and four.
    experts = np.array([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [2, 1], [3, 2], [3, 3]])[:, :, None]
    profile = Trace.from_arrays(experts, np.ones(experts.shape), [0, 4, 8], num_experts=8)
    assert make_quota("distinct", 2, 8, profile).slots(9) == [3, 6]
    quota = make_quota("distinct", 2, 8)
    for each in routing_events(profile):
        quota.observe(each)
    assert quota.slots(9) == [3, 6], "the same, seen as it runs"


def test_plec_follows_what_a_layer_goes_to_of_late() -> None:
    quota = make_quota("plec(rate=0.3, uses=50)", 2, 8)
    quota.observe(event(0, (0, 1)))
    assert quota.slots(8) == [4, 4], "not every layer has run"
    for step in range(30):
        quota.observe(event(0, (0,), step=step))
        quota.observe(event(1, (step % 6,), step=step))
    assert quota.slots(7) == [1, 6], "one expert against six"
    for step in range(60):
        quota.observe(event(0, (step % 6,), step=step))
        quota.observe(event(1, (3,), step=step))
    assert quota.slots(7) == [6, 1], "the latest counts"


@pytest.mark.parametrize("uses", [1, 4, 16])
def test_plec_expects_as_many_as_draws_would_bring(uses: int) -> None:
    shares = np.array([[4, 2, 1, 1, 0, 0], [1, 1, 1, 1, 2, 2]]) / 8
    rng = np.random.default_rng(0)
    drawn = [[len(set(rng.choice(6, uses, p=share).tolist())) for _ in range(4000)] for share in shares]
    tokens = [np.repeat(np.arange(6), (8 * share).astype(int)) for share in shares]
    experts = np.stack(tokens, axis=1)[:, :, None]
    profile = Trace.from_arrays(experts, np.ones(experts.shape), [0, 8], num_experts=6)
    quota = make_quota(f"plec(uses={uses})", 2, 6, profile)
    for total in range(1, 9):
        expected = proportional(total, np.mean(drawn, axis=1).tolist(), 6)
        assert quota.slots(total) == pytest.approx(expected, abs=1)
