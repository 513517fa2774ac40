"""Every eviction policy: the contract that all of them keep."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from synthetic import random_trace

from cache.counting.schedule import Schedule
from cache.errors import PolicyError, TraceError
from cache.lanes import Future, Ints, Lanes
from cache.policy import EvictionPolicy, find_policy, make_policy, names
from cache.residency import ExpertCache, State
from cache.traces.trace import Trace
from cache.types import ExpertKey, Phase, RoutingEvent, Tier

POLICIES = names()


class Listed(Future):
    """Events of one model, one after the other."""

    def __init__(self, events: list[RoutingEvent], lanes: Lanes) -> None:
        self.events = events
        self.experts = lanes.experts
        self.times = len(events)
        self.times_per_pass = lanes.num_layers

    def at(self, time: int) -> Ints:
        event = self.events[time]
        return np.array([event.experts], np.int64) + event.layer * self.experts


def random_events(count: int, layers: int, experts: int, seed: int) -> list[RoutingEvent]:
    """Events of one to four experts, in sequences of fifty passes; with scores that agree with nothing."""
    rng = random.Random(seed)
    events = []
    for i in range(count):
        step, layer = divmod(i, layers)
        chosen = tuple(rng.sample(range(experts), rng.randint(1, 4)))
        weights = tuple(sorted(rng.random() for _ in chosen))
        tokens = tuple(rng.randint(1, 3) for _ in chosen)
        scores = np.array([rng.random() for _ in range(experts)], np.float32)
        events.append(RoutingEvent(step // 50, step % 50, layer, Phase.DECODE, chosen, weights, tokens, scores=scores))
    return events


def profile_for(lanes: Lanes) -> Trace:
    rng = np.random.default_rng(9)
    shape = 60, lanes.num_layers, lanes.experts
    experts = np.argsort(rng.random(shape) * np.arange(1, lanes.experts + 1), axis=2)[:, :, :2]
    return Trace.from_arrays(experts, np.full(experts.shape, 0.5), [0, 20, 60], num_experts=lanes.experts)


def make(name: str, lanes: Lanes, events: list[RoutingEvent] | None = None) -> EvictionPolicy:
    """A policy that needs a profile with one; one that looks ahead sees `events`."""
    policy = make_policy(name, lanes, profile_for(lanes) if find_policy(name).learns else None)
    prepare(policy, events or [])
    return policy


def prepare(policy: EvictionPolicy, events: list[RoutingEvent]) -> None:
    if not policy.causal:
        policy.foresee(Listed(events, policy.lanes))


def order(policy: EvictionPolicy) -> list[tuple[int, int]]:
    """Every expert, first to evict first, lane after lane."""
    lanes = policy.lanes
    everything = np.ones(lanes.width, np.bool_)
    return [
        divmod(lane * lanes.width + column, lanes.experts)
        for lane in range(lanes.count)
        for column in policy.eviction_order(everything.copy(), lane)
    ]


@pytest.fixture(params=["layer", "global"])
def lanes(request: pytest.FixtureRequest) -> Lanes:
    return Lanes.per_layer(3, 16) if request.param == "layer" else Lanes.shared(3, 16)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", POLICIES)
def test_random_events(name: str, lanes: Lanes, count: int) -> None:
    """Sizes, pins, pending and protected experts mixed; each reservation is checked against a full sort."""
    events = random_events(count, lanes.num_layers, lanes.experts, seed=2)
    policy = make(name, lanes, events)
    room = 100 // lanes.count
    cache = ExpertCache(Tier.CPU, [room] * lanes.count, policy)
    rng = random.Random(1)
    sizes: dict[ExpertKey, int] = {}
    evicted = refused = 0
    for i, event in enumerate(events):
        policy.on_event(event)
        lane = event.layer * lanes.experts // lanes.width
        protected = set(event.keys)
        for key in event.keys:
            if cache.state(key) is not State.MISS:
                continue
            nbytes = rng.randint(1, 30 // lanes.count)
            values = policy.priorities(slice(None))
            free = room - cache.used[lane]
            expected = []
            for candidate in sorted(cache.resident(), key=lambda key: rank(policy, values, key)):
                here = (candidate.layer * lanes.experts) // lanes.width == lane
                if free < nbytes and here and candidate not in protected and candidate not in cache.pinned():
                    expected.append(candidate)
                    free += sizes[candidate]
            before = cache.resident(), cache.pending(), sum(cache.used)
            victims = cache.reserve(key, nbytes, protected)
            if victims is None:
                refused += 1
                assert free < nbytes
                assert (cache.resident(), cache.pending(), sum(cache.used)) == before
                continue
            assert victims == expected
            evicted += len(victims)
            sizes[key] = nbytes
        for key in cache.pending():
            if rng.random() < 0.6:
                (cache.commit if rng.random() < 0.9 else cache.abort)(key)
        for key in cache.pinned():
            cache.unpin(key)
        for key in rng.sample(cache.resident(), min(2, len(cache.resident()))):
            cache.pin(key)
        if i % 500 == 0:
            cache.check_integrity()
    cache.check_integrity()
    assert evicted > count / 2
    assert refused > count / 100


def rank(policy: EvictionPolicy, values: NDArray[Any], key: ExpertKey) -> tuple[float, int, ExpertKey]:
    where = divmod(key.layer * policy.lanes.experts + key.expert, policy.lanes.width)
    return float(values[where]), int(policy.recency[where]), key


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_events_give_the_same_order(name: str, lanes: Lanes) -> None:
    events = random_events(100, lanes.num_layers, lanes.experts, seed=3)
    policies = [make(name, lanes, events) for _ in range(2)]
    for event in events:
        for policy in policies:
            policy.on_event(event)
        assert order(policies[0]) == order(policies[1])


@pytest.mark.parametrize("name", POLICIES)
def test_asking_for_priorities_changes_nothing(name: str, lanes: Lanes) -> None:
    events = random_events(100, lanes.num_layers, lanes.experts, seed=4)
    asked, quiet = make(name, lanes, events), make(name, lanes, events)
    for event in events:
        asked.on_event(event)
        quiet.on_event(event)
        first = asked.priorities(slice(0, 1)).copy()
        order(asked)
        assert np.array_equal(asked.priorities(slice(0, 1)), first)
    assert order(asked) == order(quiet)


@pytest.mark.parametrize("name", POLICIES)
def test_reset_forgets_everything(name: str, lanes: Lanes) -> None:
    events = random_events(100, lanes.num_layers, lanes.experts, seed=5)
    used, fresh = make(name, lanes, events), make(name, lanes, events)
    start = order(fresh)
    for event in events:
        used.on_event(event)
        for key in event.keys:
            used.on_insert(np.array([key.layer * lanes.experts + key.expert]))
    used.on_evict(np.array([events[0].layer * lanes.experts + events[0].experts[0]]))
    assert order(used) != start or not np.array_equal(used.recency, fresh.recency)
    again = [events[-1], *random_events(100, lanes.num_layers, lanes.experts, seed=6)]
    used.reset()
    prepare(used, again)
    fresh = make(name, lanes, again)
    assert order(used) == order(fresh)
    for event in again:
        used.on_event(event)
        fresh.on_event(event)
        assert used.step == fresh.step
    assert order(used) == order(fresh)
    assert np.array_equal(used.priorities(slice(None)), fresh.priorities(slice(None)))


@pytest.mark.parametrize("pool", ["layer", "global"])
@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, derandomize=True, max_examples=10)
@given(seed=st.integers(0, 10**6), scores=st.booleans())
def test_a_lane_alone_ranks_as_it_does_among_others(name: str, pool: str, seed: int, scores: bool) -> None:
    trace = random_trace(seed, scores=scores)
    together = list(states(name, trace, pool))
    longest_first = sorted(range(trace.num_sequences), key=lambda s: -passes(trace, s))
    for place, sequence in enumerate(longest_first):
        alone = list(states(name, trace.select([sequence]), pool))
        lanes = len(alone[0])
        for now, among in zip(alone, together, strict=False):
            assert now == among[place * lanes :][:lanes]


def passes(trace: Trace, sequence: int) -> int:
    return len(np.unique(trace.step[slice(*trace.sequence_offsets[sequence : sequence + 2])]))


def states(name: str, trace: Trace, pool: str) -> Iterator[list[list[int]]]:
    """After each event of a cold replay, every touched lane's columns in eviction order."""
    (chunk,) = Schedule(trace, pool=pool, cold=True).chunks()
    each = trace.num_layers if pool == "layer" else 1
    room = np.full(chunk.units * each, trace.num_layers * trace.num_experts)
    lanes = Lanes(trace.num_layers, trace.num_layers // each, trace.num_experts, room)
    policy = make_policy(name, lanes, profile_for(lanes) if find_policy(name).learns else None)
    if not policy.causal:
        policy.foresee(chunk)
    inserted = np.zeros(lanes.count * lanes.width, np.bool_)
    for touch in chunk.touches():
        policy.touch(touch)
        for at in touch.at.T:
            policy.on_insert(at[~inserted[at]])
            inserted[at] = True
        everything = np.ones(lanes.width, np.bool_)
        yield [list(policy.eviction_order(everything.copy(), lane)) for lane in range(lanes.count)[touch.lanes]]


@pytest.mark.parametrize("name", POLICIES)
def test_an_event_may_need_no_expert(name: str) -> None:
    lanes = Lanes.shared(1, 4)
    used = RoutingEvent(0, 0, 0, Phase.DECODE, (2,), (1.0,), (1,))
    policy = make(name, lanes, [used, RoutingEvent(0, 0, 0, Phase.DECODE, (), (), ())])
    policy.on_event(used)
    before = order(policy)
    policy.on_event(RoutingEvent(0, 0, 0, Phase.DECODE, (), (), ()))
    assert order(policy) == before


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_prints_its_name_and_parameters(name: str) -> None:
    policy = make(name, Lanes.shared(2, 8))
    assert policy.name == name
    assert repr(policy).startswith(f"{name}(2x8, ")
    assert repr(policy.params) in repr(policy)


@pytest.mark.parametrize(
    "spec",
    [
        "mrs(alpha=0)",
        "mrs(alpha=1.5)",
        "mrs(top_p=0)",
        "sch(m=0)",
        "finemoe(maps=0)",
        "finemoe(distance=0)",
        "moe-infinity(collection=0)",
        "lfu(reset=True, decay=1)",
        "slru(segments=0)",
        "s3fifo(small=2.0)",
        "s3fifo(threshold=4)",
        "s3fifo(ghost=-1)",
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec: str) -> None:
    with pytest.raises(PolicyError, match="cannot take these parameters"):
        make_policy(spec, Lanes.shared(1, 4))


def test_a_policy_that_learns_needs_a_profile_of_the_same_model() -> None:
    lanes = Lanes.shared(2, 4)
    with pytest.raises(PolicyError, match="--profile"):
        make_policy("static", lanes)
    with pytest.raises(TraceError, match="has 2 layers of 8 experts, not 2 of 4"):
        make_policy("static", lanes, profile_for(Lanes.shared(2, 8)))


@pytest.mark.parametrize(("layers", "experts"), [(0, 4), (4, 0), (-1, 4)])
def test_a_model_without_experts_has_no_policy(layers: int, experts: int) -> None:
    with pytest.raises(ValueError, match="layers"):
        make_policy("lru", Lanes.shared(layers, experts))
