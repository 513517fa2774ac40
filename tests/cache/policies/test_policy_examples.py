"""Eviction policies on a few events, with what they should say worked out by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache.counting.counting import count
from cache.lanes import Lanes
from cache.policy import EvictionPolicy, make_policy
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent


def event(
    layer: int,
    *experts: int,
    step: int,
    sequence: int = 0,
    weights: tuple[float, ...] = (),
    tokens: tuple[int, ...] = (),
    probabilities: list[float] | None = None,
) -> RoutingEvent:
    n = len(experts)
    scores = None if probabilities is None else np.log(np.array(probabilities, np.float32))
    return RoutingEvent(
        sequence, step, layer, Phase.DECODE, experts, weights or (1 / n,) * n, tokens or (1,) * n, scores=scores
    )


def shared(spec: str, layers: int, experts: int, profile: Trace | None = None) -> EvictionPolicy:
    return make_policy(spec, Lanes.shared(layers, experts), profile)


def priorities(policy: EvictionPolicy) -> NDArray[Any]:
    """[layers, experts] of a shared pool."""
    return policy.priorities(slice(None)).reshape(policy.num_layers, policy.num_experts)


def order(policy: EvictionPolicy) -> list[tuple[int, int]]:
    """Every expert of a shared pool, first to evict first, as (layer, expert)."""
    everything = np.ones(policy.lanes.width, np.bool_)
    return [divmod(column, policy.num_experts) for column in policy.eviction_order(everything, 0)]


def test_lru() -> None:
    policy = shared("lru", 2, 4)
    assert order(policy)[:3] == [(0, 0), (0, 1), (0, 2)]
    policy.on_event(event(0, 2, 0, step=0))
    policy.on_event(event(1, 3, step=0))
    policy.on_event(event(0, 1, 2, step=1))
    never_used = [(0, 3), (1, 0), (1, 1), (1, 2)]
    assert order(policy) == [*never_used, (0, 0), (1, 3), (0, 1), (0, 2)]


def test_lfu() -> None:
    policy = shared("lfu", 1, 5)
    policy.on_event(event(0, 3, 1, step=0))
    policy.on_event(event(0, 1, 0, step=1))
    policy.on_event(event(0, 2, 1, step=2))
    policy.on_event(event(0, 3, step=3))
    # Uses 1, 3, 1, 2, 0. Experts 0 and 2 tie and 0 was used earlier.
    assert order(policy) == [(0, 4), (0, 0), (0, 2), (0, 3), (0, 1)]


def test_lfu_may_count_anew_in_every_sequence() -> None:
    kept, anew = shared("lfu", 2, 3), shared("lfu(reset=True)", 2, 3)
    for policy in (kept, anew):
        policy.on_event(event(0, 1, step=0))
        policy.on_event(event(1, 2, step=0))
        policy.on_event(event(0, 1, step=1))
        policy.on_event(event(1, 2, step=1))
        policy.on_event(event(0, 0, step=0, sequence=1))
    assert priorities(kept).tolist() == [[1, 2, 0], [0, 0, 2]]
    assert priorities(anew).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_lfru() -> None:
    policy = shared("lfru", 1, 5)
    for step, experts in enumerate([(0, 1), (0, 2), (0,), (3,)]):
        policy.on_event(event(0, *experts, step=step))
    assert priorities(policy).tolist() == [[3 / 2, 1 / 4, 1 / 3, 1 / 1, 0]]
    assert order(policy) == [(0, 4), (0, 1), (0, 2), (0, 3), (0, 0)]


def test_lfru_ties_are_broken_by_lru() -> None:
    policy = shared("lfru", 1, 4)
    for step, experts in enumerate([(3, 1), (3,), (0, 2)]):
        policy.on_event(event(0, *experts, step=step))
    # 3: two uses, one pass ago; 0 and 2: one use, now; all of priority 1. Expert 1: one use, two passes ago.
    assert order(policy) == [(0, 1), (0, 3), (0, 0), (0, 2)]


def test_lfru_counts_passes_on_when_steps_begin_anew() -> None:
    policy = shared("lfru", 2, 2)
    policy.on_event(event(0, 0, step=7))
    policy.on_event(event(1, 1, step=7))
    policy.on_event(event(0, 1, step=0, sequence=1))
    assert priorities(policy).tolist() == [[1 / 2, 1 / 1], [0, 1 / 2]]
    assert order(policy) == [(1, 0), (0, 0), (1, 1), (0, 1)]


@settings(deadline=None, derandomize=True)
@example([(2**26 - 2, 2**26 - 2), (2**26 - 3, 2**26 - 3), (1, 2), (2, 5), (2**25, 2**26 - 1)])
@given(st.lists(st.tuples(st.integers(0, 2**26 - 1), st.integers(1, 2**26 - 1)), min_size=2, max_size=12))
def test_lfru_ranks_as_exact_fractions_do(experts: list[tuple[int, int]]) -> None:
    policy = shared("lfru", 1, len(experts))
    policy.step = 2**26
    policy.uses[0] = [uses for uses, _ in experts]
    policy.last_step[0] = [2**26 - age for _, age in experts]
    policy.recency[0] = np.arange(len(experts))[::-1]
    exact = sorted(range(len(experts)), key=lambda e: (Fraction(experts[e][0], experts[e][1] + 1), -e))
    assert order(policy) == [(0, e) for e in exact]


def test_mrs_of_the_router_s_probabilities() -> None:
    policy = shared("mrs", 1, 4)
    # One expert used: the two most probable ones score.
    policy.on_event(event(0, 0, step=0, probabilities=[0.5, 0.25, 0.15, 0.1]))
    assert priorities(policy) == pytest.approx(np.array([[0.25, 0.125, 0, 0]]))
    policy.on_event(event(0, 3, step=1, probabilities=[0.125, 0.0625, 0.3125, 0.5]))
    assert priorities(policy) == pytest.approx(np.array([[0.125, 0.0625, 0.15625, 0.25]]))
    assert order(policy) == [(0, 1), (0, 0), (0, 2), (0, 3)]


def test_mrs_of_weights_where_there_are_no_scores() -> None:
    policy = shared("mrs(alpha=0.25)", 2, 4)
    policy.on_event(event(0, 1, 0, step=0, weights=(0.5, 1.5)))
    policy.on_event(event(1, 3, step=0, weights=(1.0,)))
    # Three quarters of the weight, then of what was there; layers decay at their own events.
    assert priorities(policy) == pytest.approx(np.array([[0.1875, 0.0625, 0, 0], [0, 0, 0, 0.25]]))
    policy.on_event(event(0, 2, 0, step=1, weights=(0.4, 0.6)))
    assert priorities(policy) == pytest.approx(
        np.array([[0.75 * 0.1875 + 0.15, 0.75 * 0.0625, 0.1, 0], [0, 0, 0, 0.25]])
    )


def test_mrs_scores_as_many_experts_as_it_is_told() -> None:
    policy = shared("mrs(top_p=3, alpha=1)", 1, 4)
    policy.on_event(event(0, 0, step=0, probabilities=[0.5, 0.25, 0.15, 0.1]))
    assert priorities(policy) == pytest.approx(np.array([[0.5, 0.25, 0.15, 0]]))


def test_hobbit() -> None:
    policy = shared("hobbit(lru=0.1, lfu=0.2, lhu=0.3, fld=0.4)", 2, 3)
    # Expert 1 comes after .7 of the weight, which is above .6: not a use of high precision.
    policy.on_event(event(0, 1, 0, step=0, weights=(0.3, 0.7)))
    policy.on_event(event(1, 2, step=0))
    policy.on_event(event(0, 2, 0, step=1, weights=(0.45, 0.55)))
    # The second pass, in layer 0: layer 1 is one of two layers away.
    assert priorities(policy) == pytest.approx(
        np.array(
            [
                [(0.1 * 2 + 0.2 * 2 + 0.3 * 2) / 2 + 0.4, (0.1 + 0.2) / 2 + 0.4, (0.1 * 2 + 0.2 + 0.3) / 2 + 0.4],
                [0.2, 0.2, (0.1 + 0.2 + 0.3) / 2 + 0.2],
            ]
        )
    )
    policy.on_event(event(1, 0, step=1))
    # Now layer 0 is the next one.
    assert priorities(policy)[:, 0] == pytest.approx([1.2 / 2 + 0.2, (0.1 * 2 + 0.2 + 0.3) / 2 + 0.4])
    policy.on_event(event(0, 1, step=0, sequence=1))
    assert priorities(policy) == pytest.approx(np.array([[0.4, 1.0, 0.4], [0.2, 0.2, 0.2]]))


def test_edgemoe_halves_what_is_one_layer_away() -> None:
    policy = shared("edgemoe", 3, 2)
    for step in range(2):
        for layer in range(3):
            policy.on_event(event(layer, 0, step=step))
    policy.on_event(event(0, 1, step=2))
    assert priorities(policy) == pytest.approx(np.array([[2, 1], [2 / 2, 0], [2 / 3, 0]]))


def test_moe_infinity_favours_early_layers_and_counts_tokens_of_the_sequence() -> None:
    policy = shared("moe-infinity", 2, 3)
    policy.on_event(event(0, 2, 0, step=0, tokens=(1, 3)))
    policy.on_event(event(1, 1, step=0, tokens=(4,)))
    assert priorities(policy).tolist() == [[0.75, 0, 0.25], [0, 0.5, 0]]
    policy.on_event(event(0, 1, step=0, sequence=1))
    assert priorities(policy).tolist() == [[0, 1, 0], [0, 0, 0]]


def two_sorts_of_sequences() -> Trace:
    """In one the experts 0 and 1 are used, in the other 2 and 3; in layer 1 it is the other way round."""
    low, high = [0, 1], [2, 3]
    experts = [[low, high]] * 3 + [[high, low]] * 3
    return Trace.from_arrays(experts, np.full((6, 2, 2), 0.5), [0, 3, 6], num_experts=4)


def test_moe_infinity_takes_the_nearest_recorded_sequence() -> None:
    policy = shared("moe-infinity", 2, 4, two_sorts_of_sequences())
    assert priorities(policy) == pytest.approx(np.array([[0.25] * 4, [0.125] * 4]))
    policy.on_event(event(0, 2, 3, step=0))
    assert priorities(policy) == pytest.approx(np.array([[0.25] * 4, [0.125] * 4]))
    policy.on_event(event(1, 0, 1, step=0))
    policy.on_event(event(0, 2, 3, step=1))
    assert priorities(policy) == pytest.approx(np.array([[0, 0, 0.5, 0.5], [0.25, 0.25, 0, 0]]))


def test_finemoe_multiplies_uses_with_the_mean_probability() -> None:
    policy = shared("finemoe", 1, 3)
    policy.on_event(event(0, 0, step=0, probabilities=[0.6, 0.3, 0.1]))
    policy.on_event(event(0, 1, step=1, probabilities=[0.4, 0.5, 0.1]))
    policy.on_event(event(0, 1, step=2, probabilities=[0.2, 0.7, 0.1]))
    assert priorities(policy) == pytest.approx(np.array([[0.4 * 1, 0.5 * 2, 0]]))


def test_finemoe_takes_what_a_recorded_pass_like_this_one_did_next() -> None:
    policy = shared("finemoe(distance=1)", 2, 4, two_sorts_of_sequences())
    for layer in range(2):
        policy.on_event(event(layer, 0, 1, 2, 3, step=0))
    policy.on_event(event(0, 2, 3, step=1))
    # Layer 1 as in the passes that began with 2 and 3; layer 0 as in the one nearest to the pass before.
    assert priorities(policy)[1].tolist() == [0.5, 0.5, 0, 0]
    policy.on_event(event(1, 0, 1, step=1))
    policy.on_event(event(0, 0, step=2))
    assert priorities(policy)[0].tolist() == [0, 0, 1, 1]


def test_least_stale_gives_up_what_this_pass_has_not_used_in_order_of_arrival() -> None:
    policy = shared("least-stale", 2, 3)
    columns = {"a": 0, "b": 1, "c": 3, "d": 4}
    for step, (layer, expert) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        policy.on_event(event(layer, expert, step=step))
        policy.on_insert(np.array([layer * 3 + expert]))
    policy.on_event(event(0, 0, step=4))
    policy.on_event(event(1, 1, step=4))
    values = priorities(policy).ravel()
    assert sorted(columns, key=lambda name: values[columns[name]]) == ["b", "c", "a", "d"]


def test_random_depends_on_seed_and_pass_and_nothing_else() -> None:
    def orders(spec: str, lanes: Lanes) -> list[list[int]]:
        policy = make_policy(spec, lanes)
        ranked = []
        for step in range(5):
            policy.on_event(event(1, step % 3, step=step))
            ranked.append(policy.priorities(slice(None)).reshape(3, 64).argsort(axis=1)[1].tolist())
        return ranked

    one = orders("random", Lanes.shared(3, 64))
    assert orders("random", Lanes.per_layer(3, 64)) == one
    assert orders("random(seed=1)", Lanes.shared(3, 64)) != one
    assert len({tuple(ranked) for ranked in one}) == 5


def test_random_gives_everyone_the_same_chance() -> None:
    policy = shared("random", 1, 8)
    firsts = []
    for step in range(4000):
        policy.on_event(event(0, 0, step=step))
        firsts.append(int(policy.priorities(slice(None))[0].argmin()))
    assert np.bincount(firsts, minlength=8) == pytest.approx(np.full(8, 500), abs=100)
    pairs = np.array(firsts[:-1]) * 8 + firsts[1:]
    assert np.bincount(pairs, minlength=64) == pytest.approx(np.full(64, 62.5), abs=40)


def one_at_a_time(*experts: int) -> Trace:
    return Trace.from_arrays(
        np.array(experts).reshape(-1, 1, 1), np.ones((len(experts), 1, 1)), [0, len(experts)], num_experts=4
    )


def test_belady_evicts_what_is_needed_last() -> None:
    # 2 takes the place of 1, which is needed after 0. LRU gives up 0.
    trace = one_at_a_time(0, 1, 2, 0, 2, 1, 3, 1)
    assert count(trace, "belady", [[2]])[0].hits == 3
    assert count(trace, "lru", [[2]])[0].hits == 2


def test_belady_that_may_bypass_keeps_what_it_has() -> None:
    trace = one_at_a_time(0, 1, 0, 2, 0, 3, 0)
    assert [count(trace, name, [[1]])[0].hits for name in ("belady", "belady-bypass")] == [0, 3]


def test_sch_evicts_what_is_used_least_in_its_window() -> None:
    trace = one_at_a_time(0, 1, 2, 3, 0, 1, 1, 3, 2)
    # Four ahead of 2 are one use of 0 and two of 1: 0 goes, and then 2 and 3; 1 hits twice.
    assert count(trace, "sch(m=4)", [[2]])[0].hits == 2
    # Two ahead is one use of 0: 1 goes; 0 hits, and after 1 has come back, 1 and 3.
    assert count(trace, "sch(m=2)", [[2]])[0].hits == 3


def test_static_keeps_what_the_profile_used_most() -> None:
    profile = one_at_a_time(2, 2, 2, 1, 1, 0)
    counted = count(one_at_a_time(0, 1, 2, 3, 1, 2, 3), "static", [[2]], profile=profile)[0]
    assert (counted.hits, counted.bypasses) == (2, 2)
