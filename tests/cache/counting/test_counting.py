"""Counting replay: the same decisions as the live loop, for every policy, and the bounds that must hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from synthetic import random_trace, zipf_markov

from cache.counting.count import Count
from cache.counting.counting import Moves, count
from cache.counting.schedule import runs
from cache.lanes import Lanes, Touch
from cache.policy import find_policy, make_policy, names
from cache.residency import ExpertCache
from cache.traces.trace import Trace
from cache.types import Tier
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks

VARIANTS = [
    *((name, find_policy(name).learns) for name in names()),
    *((spec, False) for spec in ("lfu(reset=True)", "random(seed=1)", "mrs(top_p=1)", "hobbit(fld=0.9)", "sch(m=2)")),
    ("dali(w_size=3, u_size=1)", False),
    *((spec, True) for spec in ("moe-infinity", "finemoe", "finemoe(distance=1)")),
]
"""Every policy as (spec, whether it gets a profile)."""

Where = tuple[int, int, int]
"""A run (a unit of the trace), a forward pass of it, a layer."""


@dataclass
class Decision:
    """What one event changed: (layer, expert) of others that went, of members that did, and of what came."""

    evicted: list[tuple[int, int]] = field(default_factory=list)
    surrendered: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[tuple[int, int]] = field(default_factory=list)


def live(
    trace: Trace, spec: str, slots: Sequence[int], *, cold: bool, profile: Trace | None
) -> tuple[Count, dict[Where, Decision]]:
    """`trace` event by event through the decision loop, one tier, every fetch arriving. What a policy exchanges
    comes with the next event, so the last event's is counted as if there were one."""
    shape = trace.num_layers, trace.num_experts
    lanes = Lanes.shared(*shape, slots[0]) if len(slots) < trace.num_layers else Lanes.per_layer(*shape, slots)
    policy = make_policy(spec, lanes, profile)
    tier = ExpertCache(Tier.GPU, [10 * n for n in slots], policy)
    manager = Manager(Stacks.single([tier], 10))
    decisions: dict[Where, Decision] = {}
    exchanges = left = 0
    for run, (events, future) in enumerate(runs(trace, cold=cold)):
        manager.clear()
        if not policy.causal:
            policy.foresee(future)
        for index, event in enumerate(events):
            before = set(tier.resident())
            plan = manager.step(event)
            assert plan.error is None
            fetches = [*plan.fetches, *plan.late_fetches]
            dropped = [key for fetch in fetches for key in fetch.evicted.get(Tier.GPU, ())]
            for fetch in (*fetches, *plan.prefetches):
                manager.arrived(fetch, 0)
            manager.finish()
            exchanges += len(plan.prefetches)
            exchanged = {fetch.key for fetch in plan.prefetches}
            gone = {key for fetch in plan.prefetches for key in fetch.evicted[Tier.GPU]}
            assert before - set(tier.resident()) == {*dropped, *gone}
            decisions[run, index // trace.num_layers, event.layer] = Decision(
                [tuple(key) for key in dropped if key not in event.keys],
                [tuple(key) for key in dropped if key in event.keys],
                [tuple(key) for key in tier.resident() if key not in before and key not in exchanged],
            )
        manager.check_integrity()
        left += sum(len(come) for come, _ in policy.exchange())
    stats, exchanges = manager.stats[Tier.GPU], exchanges + left
    evictions = stats.evictions + left
    return (
        Count(tuple(slots), stats.hits + stats.misses, stats.hits, evictions, stats.bypasses, exchanges),
        {where: decision for where, decision in decisions.items() if decision != Decision()},
    )


def counted(
    trace: Trace, spec: str, capacities: Sequence[Sequence[int]], *, cold: bool, profile: Trace | None
) -> list[tuple[Count, dict[Where, Decision]]]:
    """The same from the counting replay, all capacities at once."""
    by_layer = len(capacities[0]) == trace.num_layers > 1
    lengths = [sum(1 for _ in events) for events, _ in runs(trace, cold=cold)]
    longest_first = sorted(range(len(lengths)), key=lambda run: -lengths[run])
    decisions: list[dict[Where, Decision]] = [{} for _ in capacities]
    copies = len(capacities) if find_policy(spec).sees_cache else 1  # each capacity has lanes of its own

    def observe(touch: Touch, gone: Moves, come: Moves) -> None:
        members = set(touch.at.ravel().tolist())
        step = touch.time if by_layer else touch.time // trace.num_layers
        for moves, came in ((gone, False), (come, True)):
            for capacity, at in [(c, a) for cs, flat in moves for c, a in zip(cs.tolist(), flat.tolist(), strict=True)]:
                unit, index = divmod(at, trace.num_layers * trace.num_experts)
                unit, copy = divmod(unit, copies)
                layer, expert = divmod(index, trace.num_experts)
                now = layer if by_layer else touch.columns.start // trace.num_experts
                decision = decisions[capacity + copy].setdefault((longest_first[unit], step, now), Decision())
                what = decision.admitted if came else decision.surrendered if at in members else decision.evicted
                what.append((layer, expert))

    counts = count(
        trace,
        spec,
        capacities,
        pool="layer" if by_layer else "global",
        cold=cold,
        profile=profile,
        observer=observe,
    )
    return list(zip(counts, decisions, strict=True))


def assert_counting_equals_live(
    trace: Trace, variant: tuple[str, bool], capacities: Sequence[Sequence[int]], cold: bool
) -> int:
    """Returns how many experts went in all."""
    spec, profiled = variant
    profile = other_trace(trace) if profiled else None
    replayed = counted(trace, spec, capacities, cold=cold, profile=profile)
    for slots, (totals, decisions) in zip(capacities, replayed, strict=True):
        expected, expected_decisions = live(trace, spec, slots, cold=cold, profile=profile)
        assert totals == expected
        assert decisions == expected_decisions
    return sum(totals.evictions for totals, _ in replayed)


@cache
def golden() -> Trace:
    return zipf_markov()


@cache
def part_of_golden(sequences: range) -> Trace:
    return golden().select(sequences)


@cache
def golden_profile() -> Trace:
    return zipf_markov(21)


def other_trace(trace: Trace) -> Trace:
    """A profile for `trace`."""
    return golden_profile() if trace.num_experts == golden().num_experts else trace.select([0])


@pytest.mark.parametrize(
    ("pool", "cold", "sequences"),
    [
        ("layer", False, range(1, 3)),
        ("global", True, range(1, 3)),
        *(
            pytest.param(*every, marks=pytest.mark.full)
            for every in product(["layer", "global"], [True, False], [range(7)])
        ),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS, ids=[spec + "+profile" * profiled for spec, profiled in VARIANTS])
def test_counting_decides_as_the_live_loop_does(
    variant: tuple[str, bool], pool: str, cold: bool, sequences: range
) -> None:
    trace = part_of_golden(sequences)
    layers = trace.num_layers
    # 3 is less than an event needs, and quotas may differ from layer to layer.
    capacities = [[3] * layers, [8, 3, 16, 6]] if pool == "layer" else [[3], [40]]
    assert assert_counting_equals_live(trace, variant, capacities, cold) > 0


@pytest.mark.parametrize("variant", VARIANTS, ids=[spec + "+profile" * profiled for spec, profiled in VARIANTS])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(data=st.data())
def test_counting_decides_as_the_live_loop_does_on_random_traces(
    variant: tuple[str, bool], data: st.DataObject
) -> None:
    trace = random_trace(
        data.draw(st.integers(0, 10**6), "seed"),
        batched=data.draw(st.booleans(), "batched"),
        scores=data.draw(st.booleans(), "scores"),
    )
    # With one layer, the next event looks up before what was exchanged comes.
    assume(trace.num_layers > 1 or not find_policy(variant[0]).exchanges)
    lanes = data.draw(st.sampled_from([1, trace.num_layers]), "lanes")
    room = trace.num_experts * trace.num_layers // lanes + 1
    slots = st.lists(st.integers(0, room), min_size=lanes, max_size=lanes)
    capacities = data.draw(st.lists(slots, min_size=1, max_size=3), "capacities")
    assert_counting_equals_live(trace, variant, capacities, data.draw(st.booleans(), "cold"))


@pytest.mark.parametrize("spec", ["lru", "mrs", "moe-infinity", "belady", "sch", "sch(m=2)"])
@pytest.mark.parametrize("pool", ["layer", "global"])
def test_a_trace_in_small_pieces_gives_the_same_counts(spec: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few passes at a time, a few lanes side by side, and Belady's knowledge in a file."""
    capacities = [[8] * golden().num_layers if pool == "layer" else [32]]
    at_once = count(golden(), spec, capacities, pool=pool)
    monkeypatch.setattr("cache.counting.schedule._BLOCK_PASSES", 5)
    monkeypatch.setattr("cache.counting.schedule.MAX_LANES", 10)
    monkeypatch.setattr("cache.policies.belady._IN_MEMORY", 100)
    assert count(golden(), spec, capacities, pool=pool) == at_once
