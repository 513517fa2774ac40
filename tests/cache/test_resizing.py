"""Lanes that get other capacities while they hold experts: nothing goes that fits, and nothing is left inconsistent."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from small_cache import EXPERTS, LAYERS, A, B, C, fill, make_cache, use

from cache.lanes import Lanes
from cache.policy import find_policy, make_policy, names
from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Tier

CAUSAL = [name for name in names() if find_policy(name).causal and not find_policy(name).learns]


def per_layer(policy: str, slots: int) -> ExpertCache:
    """Each layer has a lane for so many experts, of a byte."""
    lanes = Lanes.per_layer(LAYERS, EXPERTS, slots)
    return ExpertCache(Tier.CPU, [slots] * LAYERS, make_policy(policy, lanes))


def test_a_lane_that_shrinks_loses_its_least_and_one_that_grows_keeps_all() -> None:
    cache = make_cache(30, 30, 30)
    other = ExpertKey(1, 2)
    fill(cache, A, B, C)
    fill(cache, other)
    assert cache.resize([1, 5, 3], 10) == [A, B]
    assert cache.capacities == [10, 50, 30] and cache.resident() == [C, other]
    assert cache.policy.lanes.slots.tolist() == [1, 5, 3]
    assert cache.resize([3, 3, 3], 10) == [] and cache.resident() == [C, other]
    cache.check_integrity(idle=True)


def test_what_may_not_go_stays() -> None:
    cache = make_cache(30, 30, 30)
    fill(cache, A, B, C)
    assert cache.resize([2, 4, 3], 10, protected=[A]) == [B]
    cache.pin(A)
    assert cache.resize([0, 6, 3], 10) is None
    assert cache.capacities == [20, 40, 30] and cache.resident() == [A, C]
    cache.unpin(A)
    cache.reserve(ExpertKey(1, 0), 10)
    assert cache.resize([6, 0, 3], 10) is None, "what is on its way has its place"
    cache.check_integrity()


def test_ranked_lanes_lose_the_lowest() -> None:
    cache = make_cache(30, 30, 30)
    fill(cache, A, B, C)
    cache.rank(np.array([[2.0, 3.0, 1.0, 0.0]] * LAYERS))
    assert cache.resize([1, 4, 4], 10) == [C, A]


@pytest.mark.parametrize("slots", [[3, 3], [4, 3, 3], [10, -1, 0]])
def test_more_than_there_is_is_refused(slots: list[int]) -> None:
    cache = make_cache(30, 30, 30)
    with pytest.raises(ValueError, match="lanes of"):
        cache.resize(slots, 10)
    assert cache.capacities == [30, 30, 30]


class Resized(RuleBasedStateMachine):
    """Events, prefetches and new divisions in any order, under every causal policy."""

    @initialize(policy=st.sampled_from(CAUSAL), slots=st.integers(0, EXPERTS))
    def start(self, policy: str, slots: int) -> None:
        self.cache = per_layer(policy, slots)
        self.total = slots * LAYERS
        self.step = 0

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.permutations(range(EXPERTS)), k=st.integers(1, EXPERTS))
    def event(self, layer: int, experts: list[int], k: int) -> None:
        keys = [ExpertKey(layer, expert) for expert in experts[:k]]
        use(self.cache, *keys, step=self.step)
        self.step += 1
        for key in self.cache.admit(keys, 1).admitted:
            self.cache.commit(key)

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1), arrives=st.booleans())
    def prefetch(self, layer: int, expert: int, arrives: bool) -> None:
        key = ExpertKey(layer, expert)
        if self.cache.state(key) is State.PENDING:
            (self.cache.commit if arrives else self.cache.abort)(key)
        elif self.cache.state(key) is State.MISS:
            self.cache.reserve(key, 1)

    @rule(weights=st.lists(st.integers(0, 9), min_size=LAYERS, max_size=LAYERS), protects=st.integers(0, LAYERS))
    def divide(self, weights: list[int], protects: int) -> None:
        cache = self.cache
        slots = np.floor(np.array(weights) * self.total / max(sum(weights), 1)).astype(int).tolist()
        protected = [ExpertKey(protects, expert) for expert in range(EXPERTS)]
        before = cache.resident()
        stuck = [0] * LAYERS
        for key in (*cache.pending(), *(key for key in before if key in protected)):
            stuck[key.layer] += 1
        held = defaultdict(int, zip(range(LAYERS), cache.used, strict=True))
        gone = cache.resize(slots, 1, protected)
        if any(here > room for here, room in zip(stuck, slots, strict=True)):
            assert gone is None and cache.resident() == before
            return
        assert gone is not None and cache.capacities == slots
        self.total = sum(slots)
        assert cache.resident() == [key for key in before if key not in gone]
        for layer, room in enumerate(slots):
            assert sum(key.layer == layer for key in gone) == max(held[layer] - room, 0), "no more than it must"

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            assert self.cache.capacity_bytes == self.total


TestResized = Resized.TestCase
TestResized.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
