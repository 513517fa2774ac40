"""No policy is better than Belady's, which is as good as trying everything; and figures of an independent replay."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import random_trace, zipf_markov
from traces import SMALL, recorded

from cache.counting.counting import count
from cache.counting.schedule import runs
from cache.policy import find_policy, names
from cache.traces.trace import Trace

# Against trying everything

Held = frozenset[int]


def fewest_misses(events: Sequence[tuple[int, ...]], slots: int, *, bypass: bool) -> int:
    """Over all that a cache of so many slots may hold after each event, which names its members in touch order."""
    best: dict[Held, int] = {frozenset(): 0}
    for members in events:
        following: dict[Held, int] = {}
        for held, misses in best.items():
            missing = sum(member not in held for member in members)
            for kept in choices(held, members, slots, bypass=bypass):
                following[kept] = min(following.get(kept, misses + missing), misses + missing)
        best = following
    return min(best.values())


def choices(held: Held, members: tuple[int, ...], slots: int, *, bypass: bool) -> Iterator[Held]:
    """What the cache may hold after an event. Giving up more than one has to never helps."""
    if bypass:
        everything = held.union(members)
        yield from map(frozenset, itertools.combinations(sorted(everything), min(slots, len(everything))))
        return
    forced = frozenset(members[-slots:] if slots else ())
    others = held.difference(members)
    room = min(slots - len(forced), len(others))
    for kept in itertools.combinations(sorted(others), room):
        yield forced.union(kept)


def fewest_in_trace(trace: Trace, slots: Sequence[int], *, cold: bool, bypass: bool) -> int:
    """The sum over runs and pools; with one number of slots, one pool for all layers."""
    total = 0
    for events, _ in runs(trace, cold=cold):
        every = [(event.layer, tuple(event.layer * trace.num_experts + e for e in event.experts)) for event in events]
        for pool, room in enumerate(slots):
            here = [members for layer, members in every if len(slots) == 1 or layer == pool]
            total += fewest_misses(here, room, bypass=bypass)
    return total


@pytest.mark.parametrize("name", ["belady", "belady-bypass"])
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 10**6), batched=st.booleans(), cold=st.booleans(), one=st.booleans(), slots=st.integers(0, 4)
)
def test_belady_is_as_good_as_trying_everything(
    name: str, seed: int, batched: bool, cold: bool, one: bool, slots: int
) -> None:
    trace = random_trace(seed, batched=batched)
    capacity = [min(slots, 3)] if one else [(slots + layer) % 5 for layer in range(trace.num_layers)]
    (replayed,) = count(trace, name, [capacity], pool="global" if one else "layer", cold=cold)
    assert replayed.misses == fewest_in_trace(trace, capacity, cold=cold, bypass=name == "belady-bypass")


# Against every policy

CAPACITIES = (1, 3, 4, 5, 6, 8, 10, 13, 16, 24, 32)
"""Experts a layer: less than an event needs, just as many, and more."""


def assert_bounds_hold(trace: Trace, profile: Trace, pool: str, cold: bool, slots: Sequence[int]) -> None:
    layers = trace.num_layers
    capacities = [[n] * layers if pool == "layer" else [n * layers] for n in slots]

    def hits(name: str) -> list[int]:
        learnt = profile if find_policy(name).can_learn else None
        return [c.hits for c in count(trace, name, capacities, pool=pool, cold=cold, profile=learnt)]

    forced, bypassing = hits("belady"), hits("belady-bypass")
    for name in names():
        reached = hits(name)
        assert all(a <= b for a, b in zip(reached, bypassing, strict=True)), name
        if not find_policy(name).bypass:
            assert all(a <= b for a, b in zip(reached, forced, strict=True)), name


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("pool", ["layer", "global"])
@pytest.mark.parametrize("sequences", [range(1, 3), pytest.param(range(7), marks=pytest.mark.full)], ids=["two", "all"])
def test_no_policy_beats_belady_on_the_made_up_trace(pool: str, cold: bool, sequences: range) -> None:
    slots = CAPACITIES if pool == "layer" else CAPACITIES[1::4]
    assert_bounds_hold(zipf_markov().select(sequences), zipf_markov(21), pool, cold, slots)


def test_no_policy_beats_belady_on_a_real_trace() -> None:
    trace = recorded(SMALL)
    assert_bounds_hold(trace, trace.select(range(3)), "layer", True, (4, 8, 16))


# Against figures from elsewhere


@pytest.mark.parametrize(
    ("name", "cold", "rates"),
    [
        ("lru", True, (0.655, 0.891)),
        ("belady", True, (0.770, 0.940)),
        ("lru", False, (0.657, 0.896)),
        ("belady", False, (0.773, 0.948)),
    ],
)
def test_hit_rates_are_those_of_an_independent_replay(name: str, cold: bool, rates: tuple[float, float]) -> None:
    trace = recorded(SMALL)
    counts = count(trace, name, [[8] * trace.num_layers, [16] * trace.num_layers], cold=cold)
    assert [c.hit_rate for c in counts] == pytest.approx(rates, abs=0.005)
