"""Dividing a capacity among layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import random_trace, zipf_markov

from cache.counting.counting import count
from cache.errors import PolicyError, TraceError
from cache.quota import NAMES, distinct, even, most_hits, proportional, shallow, split
from cache.traces.miss_ratio import lru_miss_ratio_curve
from cache.traces.trace import Trace


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 10**6), total=st.integers(0, 30))
def test_every_rule_hands_out_the_whole_capacity(name: str, seed: int, total: int) -> None:
    profile = random_trace(seed)
    layers, experts = profile.num_layers, profile.num_experts
    slots = split(name, total, layers, experts, profile)
    assert len(slots) == layers
    assert sum(slots) == min(total, layers * experts)
    assert all(0 <= n <= experts for n in slots)


def test_even_gives_the_rest_to_the_first_layers() -> None:
    assert even(10, 4, 8) == [3, 3, 2, 2]


def test_shallow_keeps_the_first_layers_whole() -> None:
    assert shallow(192, 24, 32) == [32] * 3 + [5] * 12 + [4] * 9
    # Two whole layers leave 13 slots to 22 layers, less than half of the even 3 each; one leaves 45.
    assert shallow(77, 24, 32) == [32] + [2] * 22 + [1]
    assert shallow(20, 24, 32) == even(20, 24, 32)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 4), experts=st.integers(1, 4), total=st.integers(0, 18))
def test_dp_is_as_good_as_trying_everything(seed: int, layers: int, experts: int, total: int) -> None:
    rng = np.random.default_rng(seed)
    hits = np.cumsum(rng.integers(0, 9, (layers, experts + 1)), axis=1)  # not concave: greedy would fail
    slots = most_hits(total, hits)

    def reached(division: tuple[int, ...]) -> int:
        return sum(int(curve[n]) for curve, n in zip(hits, division, strict=True))

    divisions = itertools.product(range(experts + 1), repeat=layers)
    assert reached(tuple(slots)) == max(reached(d) for d in divisions if sum(d) == min(total, layers * experts))


def test_dp_has_the_hits_that_the_curves_promise_and_no_fewer_than_even() -> None:
    trace = zipf_markov()
    curve = lru_miss_ratio_curve(trace, cold=True).hits
    slots = split("dp", 40, trace.num_layers, trace.num_experts, trace)
    divided, evenly = count(trace, "lru", [slots, even(40, trace.num_layers, trace.num_experts)])
    assert divided.hits == sum(curve[layer, n] for layer, n in enumerate(slots))
    assert divided.hits >= evenly.hits


def test_distinct_follows_how_many_experts_a_sequence_uses() -> None:
    # Layer 0 goes to one expert in the first sequence and to three in the second, layer 1 to four and four.
    experts = np.array([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [2, 1], [3, 2], [3, 3]])[:, :, None]
    profile = Trace.from_arrays(experts, np.ones(experts.shape), [0, 4, 8], num_experts=8)
    assert distinct(9, profile) == [3, 6]


def test_what_a_layer_cannot_hold_goes_to_the_others() -> None:
    assert proportional(10, [8, 1, 1], 4) == [4, 3, 3]
    assert proportional(10, [1, 1, 1], 4) == [4, 3, 3]
    assert proportional(99, [1, 2, 3], 4) == [4, 4, 4]


def test_a_rule_that_measures_needs_a_profile_of_the_same_model() -> None:
    with pytest.raises(PolicyError, match="choose one of even, shallow, dp, distinct"):
        split("fair", 9, 2, 4, None)
    with pytest.raises(PolicyError, match="--profile"):
        split("dp", 9, 2, 4, None)
    with pytest.raises(TraceError, match="4 layers of 32 experts, not 2 of 4"):
        split("distinct", 9, 2, 4, zipf_markov())
