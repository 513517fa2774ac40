"""Policies made of queues: worked examples, and their papers' algorithms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import textbook
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.counting.counting import count
from cache.lanes import Ints, Lanes
from cache.policy import EvictionPolicy, make_policy
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent

ALGORITHMS: dict[str, Callable[[int], textbook.Textbook]] = {
    "fifo": textbook.FIFO,
    "lifo": textbook.LIFO,
    "slru": textbook.SLRU,
    "slru(fill=False)": lambda slots: textbook.SLRU(slots, fill=False),
    "slru(segments=2)": lambda slots: textbook.SLRU(slots, segments=2),
    "arc": textbook.ARC,
    "sieve": textbook.SIEVE,
    "s3fifo": textbook.S3FIFO,
    "s3fifo(fill=False)": lambda slots: textbook.S3FIFO(slots, fill=False),
    "s3fifo(small=0.4, ghost=0.3)": lambda slots: textbook.S3FIFO(slots, small=0.4, ghost=0.3),
    "s3fifo(small=0.5, threshold=1)": lambda slots: textbook.S3FIFO(slots, small=0.5, threshold=1),
}


class Driver:
    """One cache of `slots` experts under a policy, which evicts and admits as `ExpertCache` does."""

    def __init__(self, spec: str, slots: int, experts: int) -> None:
        self.policy = make_policy(spec, Lanes.shared(1, experts, slots))
        self.slots = slots
        self.held = np.zeros(experts, np.bool_)
        self.step = 0

    def touch(self, *members: int) -> None:
        n = len(members)
        self.policy.on_event(RoutingEvent(0, self.step, 0, Phase.DECODE, members, (1 / n,) * n, (1,) * n))
        self.step += 1

    def order(self, but: Sequence[int] = ()) -> list[int]:
        candidates = self.held.copy()
        candidates[list(but)] = False
        return list(self.policy.eviction_order(candidates, 0))

    def evict(self, column: int) -> None:
        self.held[column] = False
        self.policy.on_evict(np.array([column]))

    def event(self, *members: int) -> list[int]:
        """What had to go, first to last."""
        self.touch(*members)
        missing = [member for member in members if not self.held[member]]
        surplus = max(int(self.held.sum()) + len(missing) - self.slots, 0)
        victims = self.order(but=members)[:surplus]
        for victim in victims:
            self.evict(victim)
        for member in missing:
            self.held[member] = True
            self.policy.on_insert(np.array([member]))
        return victims


# Worked examples


def test_fifo_by_hand() -> None:
    cache = Driver("fifo", 3, 6)
    assert [cache.event(x) for x in (0, 1, 2)] == [[], [], []]
    assert cache.event(0) == []
    assert cache.event(3) == [0]
    assert cache.event(1, 4, 0) == [2, 3]
    assert cache.order() == [1, 4, 0]


def test_lifo_by_hand() -> None:
    cache = Driver("lifo", 3, 6)
    for x in (0, 1, 2):
        cache.event(x)
    assert cache.event(3) == [2]
    assert cache.event(3, 4) == [1]
    assert cache.order() == [4, 3, 0]


def test_slru_by_hand() -> None:
    cache = Driver("slru(segments=2, fill=False)", 4, 8)
    for x in (0, 1, 2, 3):
        cache.event(x)
    cache.event(0, 1)
    assert cache.order() == [2, 3, 0, 1]
    # The upper list holds two: 0 goes to the lower one's head.
    cache.event(2)
    assert cache.order() == [3, 0, 1, 2]
    assert cache.event(4) == [3]
    assert cache.order() == [0, 4, 1, 2]
    # All three are lifted, 2 within the upper list, before it is shortened to its last two: 0 and 2.
    cache.event(4, 0, 2)
    assert cache.order() == [1, 4, 0, 2]


def test_slru_fills_the_lowest_list_that_has_room() -> None:
    cache = Driver("slru(segments=2)", 5, 8)
    for x in range(5):
        cache.event(x)
    # The lower list has three places.
    assert cache.event(5) == [0]
    assert cache.order() == [1, 2, 5, 3, 4]


def test_arc_by_hand() -> None:
    cache = Driver("arc", 2, 8)
    cache.event(0)
    cache.event(1)
    cache.event(0)  # T1 = [1], T2 = [0]
    assert cache.event(2) == [1]  # p = 0; B1 = [1]
    assert cache.event(1) == [0]  # p = 1, and T1 = [2] is no longer than that; B2 = [0], T2 = [1]
    assert cache.event(0) == [2]  # p = 0 again; B1 = [2], T2 = [1, 0]
    assert cache.event(3) == [1]
    assert cache.event(0, 4) == [3]  # T1 = [3] is longer than 0
    assert cache.order() == [4, 0]


def test_arc_lets_what_returns_to_t2_take_from_a_t1_that_is_as_long_as_it_should_be() -> None:
    cache = Driver("arc", 3, 4)
    for x in (0, 1, 1, 2):
        cache.event(x)  # T1 = [0, 2], T2 = [1]
    assert cache.event(3) == [0]  # p = 0; B1 = [0]
    assert cache.event(0) == [2]  # p = 1; T1 = [3], B1 = [2], T2 = [1, 0]
    assert cache.event(2) == [1]  # p = 2; B1 = [], B2 = [1], T2 = [0, 2]
    assert cache.event(1) == [3]  # p = 1, and T1 has one
    assert cache.order() == [0, 2, 1]


def test_sieve_by_hand() -> None:
    cache = Driver("sieve", 3, 8)
    for x in (0, 1, 2, 0):
        cache.event(x)
    assert cache.event(3) == [1]  # 0 is forgiven
    assert cache.order() == [2, 3, 0]
    cache.event(2)
    assert cache.event(4) == [3]  # the newest: the hand starts anew
    assert cache.event(5) == [0]
    assert cache.order() == [2, 4, 5]
    cache.event(2, 4, 5)
    assert cache.order() == [2, 4, 5]
    assert cache.event(6, 7) == [2, 4]
    assert cache.order() == [5, 6, 7]


def test_s3fifo_by_hand() -> None:
    cache = Driver("s3fifo(small=0.25, ghost=0.5, fill=False)", 4, 8)
    for x in (0, 1, 2, 3, 0, 0):
        cache.event(x)
    assert cache.event(4) == [1]  # small = [2, 3, 4], main = [0], ghost = [1]
    assert cache.event(5) == [2]  # ghost = [1, 2]
    assert cache.event(1) == [3]  # small = [4, 5], main = [0, 1], ghost = [2, 3]
    cache.event(0)
    assert cache.event(6) == [4]  # ghost = [3, 4]
    assert cache.event(3) == [5]  # small = [6], main = [0, 1, 3]
    assert cache.event(4) == [6]  # small = [], main = [0, 1, 3, 4]
    assert cache.event(7) == [1]  # 0 was used and goes to the end
    assert cache.order() == [7, 3, 4, 0]


# Textbook algorithms


def traced(requests: Ints) -> Trace:
    """`requests` [time, layers] as a trace of one sequence of tokens that go to one expert each."""
    uses = requests[:, :, None]
    return Trace.from_arrays(uses, np.ones(uses.shape, np.float32), [0, len(requests)], num_experts=9)


requests_of_lanes = st.integers(1, 3).flatmap(
    lambda lanes: st.tuples(
        st.lists(st.lists(st.integers(0, 8), min_size=lanes, max_size=lanes), min_size=1, max_size=150),
        st.lists(st.integers(1, 8), min_size=lanes, max_size=lanes),
    )
)


@pytest.mark.parametrize("spec", ALGORITHMS)
@given(requests_of_lanes)
@settings(deadline=None)
def test_lanes_evict_what_the_textbook_evicts(spec: str, drawn: tuple[list[list[int]], list[int]]) -> None:
    requests, slots = np.array(drawn[0]), drawn[1]
    victims: list[tuple[int, int, int]] = []  # (time, lane, expert)

    def observe(touch: Any, gone: list[tuple[Ints, Ints]], come: list[tuple[Ints, Ints]]) -> None:
        victims.extend((touch.time, *divmod(place, 9)) for _, at in gone for place in at.tolist())

    replayed = count(traced(requests), spec, [slots], cold=False, observer=observe)[0]
    expected = []
    misses = 0
    for lane, size in enumerate(slots):
        cache = ALGORITHMS[spec](size)
        for time, x in enumerate(requests[:, lane].tolist()):
            misses += x not in cache.held
            victim = cache.request(x)
            if victim is not None:
                expected.append((time, lane, victim))
    assert sorted(victims) == sorted(expected)
    assert replayed.misses == misses


@pytest.mark.parametrize("spec", ALGORITHMS)
@given(st.lists(st.integers(0, 8), max_size=100), st.integers(1, 8))
@settings(deadline=None)
def test_the_order_is_that_of_successive_evictions(spec: str, requests: list[int], slots: int) -> None:
    driver, cache = Driver(spec, slots, 10), ALGORITHMS[spec](slots)
    for x in requests:
        assert driver.event(x) == [victim for victim in [cache.request(x)] if victim is not None]
    # Something never seen is needed now: nothing from a ghost queue.
    driver.touch(9)
    if isinstance(cache, textbook.ARC):
        cache.from_b2 = False
    order = driver.order()
    for victim in order:
        assert victim == cache.evict()
        assert driver.order()[0] == victim
        driver.evict(victim)
    assert not cache.held


events = st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True), max_size=80)


@given(events, st.integers(3, 8))
@settings(deadline=None)
def test_arc_remembers_as_many_as_twice_its_slots(events: list[list[int]], slots: int) -> None:
    driver = Driver("arc", slots, 12)
    for members in events:
        driver.event(*members)
        t1, t2, b1, b2 = driver.policy._lengths(np.array([0]))[:, 0]  # type: ignore[attr-defined]
        assert t1 + t2 == driver.held.sum() <= slots
        assert t1 + b1 <= slots
        assert t1 + t2 + b1 + b2 <= 2 * slots


@given(events, st.integers(3, 8))
@settings(deadline=None)
def test_s3fifo_s_queues_keep_their_lengths(events: list[list[int]], slots: int) -> None:
    driver = Driver("s3fifo(small=0.4, ghost=0.5)", slots, 12)
    for members in events:
        driver.event(*members)
        queue, place = driver.policy.queue[0], driver.policy.place[0]  # type: ignore[attr-defined]
        small, main, ghost = ((queue == number).nonzero()[0] for number in (1, 2, 3))
        assert sorted([*small, *main]) == driver.held.nonzero()[0].tolist()
        assert len(ghost) <= slots // 2
        assert sorted(place[main]) == list(range(len(main)))


# Lanes


@pytest.mark.parametrize("spec", ALGORITHMS)
def test_lanes_together_count_as_lanes_alone(spec: str) -> None:
    rng = np.random.default_rng(1)
    tokens, layers, experts = 300, 4, 12
    popularity = rng.random((layers, experts)) ** 3
    weights = (rng.random((tokens, layers, experts)) * popularity).astype(np.float32)
    uses = np.argsort(-weights)[:, :, :3]
    weights = np.take_along_axis(weights, uses, axis=2)
    step = np.arange(tokens)
    step[:5] = 0  # a prompt
    trace = Trace.from_arrays(uses, weights, [0, 200, 300], num_experts=experts, step=np.r_[step[:200], step[:100]])
    slots = [3, 5, 8, 11]
    together = count(trace, spec, [slots], cold=True)[0]
    alone = [
        count(
            Trace.from_arrays(
                uses[:, [layer]], weights[:, [layer]], trace.sequence_offsets, num_experts=experts, step=trace.step
            ),
            spec,
            [[slots[layer]]],
            cold=True,
        )[0]
        for layer in range(layers)
    ]
    assert together.hits == sum(each.hits for each in alone)
    assert together.evictions == sum(each.evictions for each in alone)
    assert 0 < together.hits < together.accesses


def test_the_rules_that_see_the_cache_say_so() -> None:
    policies: list[EvictionPolicy] = [make_policy(spec, Lanes.shared(1, 8)) for spec in ALGORITHMS]
    assert all(policy.sees_cache for policy in policies)
