"""DALI's cache: misses change nothing, and every few passes the busiest outside and the idlest inside change places."""

from __future__ import annotations

import numpy as np
import pytest

from cache.counting.count import Count
from cache.counting.counting import count
from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import EvictionPolicy, make_policy
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent


def trace_of(*passes: tuple[int, int]) -> Trace:
    """Two layers that both use two experts of eight a pass: these."""
    experts = np.array([[each, each] for each in passes])
    return Trace.from_arrays(experts, np.full(experts.shape, 0.5), [0, len(passes)], num_experts=8)


def counted(trace: Trace, policy: str, slots: int = 2) -> Count:
    (found,) = count(trace, policy, [[slots] * 2])
    return found


def test_a_miss_changes_nothing_until_the_window_is_over() -> None:
    trace = trace_of((0, 1), *[(6, 7)] * 6)
    within = counted(trace, "dali(w_size=9, u_size=2)")
    assert (within.hits, within.exchanges, within.bypasses) == (0, 0, 24)
    assert counted(trace, "lru").hits == 2 * 10


def test_the_busiest_outside_change_places_with_the_idlest_inside() -> None:
    trace = trace_of((0, 1), (0, 6), (0, 7), (0, 6), *[(0, 6)] * 3)
    # Of 0 and 1, which came first, 1 is the idlest; 6 has two tokens more than 7. From the fifth pass on 6 is there.
    exchanged = counted(trace, "dali(w_size=4, u_size=1)")
    assert exchanged.exchanges == 2 == exchanged.evictions
    assert exchanged.hits == 2 * (3 + 2 * 3)
    assert counted(trace, "dali(w_size=7, u_size=1)").hits == 2 * 6


def test_no_more_than_the_step_s_size_change_places() -> None:
    trace = trace_of((0, 1), *[(6, 7)] * 7)
    # After the second pass 6 and 7 tie with 0 and 1; after the fourth they are ahead.
    one = counted(trace, "dali(w_size=4, u_size=1)")
    two = counted(trace, "dali(w_size=4, u_size=2)")
    assert (one.hits, two.hits) == (2 * 4, 2 * 8)
    assert (one.exchanges, two.exchanges) == (2 * 2, 2 * 2)  # the last window's comes too late to hit


def test_tokens_are_counted_anew_after_each_exchange() -> None:
    # 6 has three tokens in the first window; in the second it has one, and 7 two.
    passes = [(0, 1), (0, 6), (0, 6), (0, 6), (0, 6), (0, 7), (0, 7), (0, 2), (0, 7)]
    trace = trace_of(*passes)
    policy = "dali(w_size=4, u_size=1)"
    # 7 takes the place of 6, which would have four tokens if all counted.
    assert counted(trace, policy).hits - counted(trace_of(*passes[:-1]), policy).hits == 2 * 2


def test_equal_counts_change_nothing() -> None:
    trace = trace_of((0, 1), (6, 7), (0, 1), (6, 7))
    assert counted(trace, "dali(w_size=2, u_size=2)").exchanges == 0


def test_tokens_count_and_not_events() -> None:
    policy = one_layer("dali(w_size=2, u_size=1)")
    for expert in (0, 1):
        policy.on_insert(np.array([expert]))
    policy.on_event(event((0, 1, 6), (2, 3, 9), step=0))
    assert policy.exchange() == []
    policy.on_event(event((0, 1), (2, 1), step=1))
    ((come, gone),) = policy.exchange()
    assert (come.tolist(), gone.tolist()) == ([6], [0])  # 9 tokens for 4, where 0 and 1 tie and 1 was used last
    policy.on_event(event((0, 1), (2, 1), step=2))
    assert policy.exchange() == []


def test_one_that_is_not_full_has_nothing_to_exchange() -> None:
    policy = one_layer("dali(w_size=1, u_size=1)")
    policy.on_insert(np.array([0]))
    policy.on_event(event((6,), (1,), step=0))
    assert policy.exchange() == []


@pytest.mark.parametrize("wrong", ["dali(w_size=0)", "dali(u_size=0)"])
def test_sizes_are_positive(wrong: str) -> None:
    with pytest.raises(PolicyError, match="cannot take these parameters"):
        one_layer(wrong)


def one_layer(spec: str) -> EvictionPolicy:
    return make_policy(spec, Lanes.per_layer(1, 8, 2))


def event(experts: tuple[int, ...], tokens: tuple[int, ...], step: int) -> RoutingEvent:
    return RoutingEvent(0, step, 0, Phase.PREFILL, experts, (1.0,) * len(experts), tokens)
