"""What holds of the decision loop whatever the events, and whatever the policy: right ones and a faulty one."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import by_hand
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from one_precision import EXPERTS, LAYERS, SLOT, K, manager_of, run

from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import EvictionPolicy, find_policy, names
from cache.residency import ExpertCache
from cache.types import ExpertKey, Tier
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks

EVENTS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=EXPERTS),
        st.integers(0, 2**16),
        st.integers(0, 99),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(
    events=EVENTS,
    gpu=st.integers(0, 9),
    cpu=st.integers(0, 30),
    tiers=st.integers(1, 2),
    policy=st.sampled_from([name for name in names() if find_policy(name).causal and not find_policy(name).learns]),
)
def test_any_sequence_of_events(events: list[Any], gpu: int, cpu: int, tiers: int, policy: str) -> None:
    """Rules that hold for every policy and size, with transfers of which some fail."""
    manager = manager_of(*(gpu, cpu)[:tiers], policy=policy)
    held: dict[Tier, set[ExpertKey]] = {cache.tier: set() for cache in manager.caches}
    accesses = from_disk = 0
    for step, (layer, experts, bits, failing) in enumerate(events):
        event = by_hand.event(layer, experts, step, tokens=[1 + (bits >> i) % 4 for i in range(len(experts))])
        before = {tier: set(keys) for tier, keys in held.items()}
        plan = manager.step(event)
        accesses += len(experts)
        computing = manager.computing.tier
        assert set(plan.resident) == before[computing] & set(event.keys)
        fetches = [*plan.fetches, *plan.late_fetches]
        assert {f.key for f in fetches} == set(event.keys) - before[computing]
        for fetch in fetches:
            ram_has_it = tiers == 2 and fetch.key in before[Tier.CPU]
            assert fetch.source is (Tier.CPU if ram_has_it else Tier.DISK)
            assert not (ram_has_it and Tier.CPU in fetch.admitted)
            for tier, victims in fetch.evicted.items():
                # A tier keeps what is used there: computed, or copied from. Late fetches start after that.
                late = tier is computing and fetch in plan.late_fetches
                copied = {f.key for f in fetches if f.source is tier}
                used = set(event.keys) if tier is computing else copied
                assert tier in fetch.admitted and (late or not set(victims) & used)
                held[tier] -= set(victims)
            for tier in fetch.admitted:
                held[tier].add(fetch.key)
        for cache in manager.caches:
            assert len(held[cache.tier]) * SLOT == sum(cache.used) <= cache.capacity_bytes
        for fetch in fetches:
            if fetch.key.expert == failing:
                manager.failed(fetch)
                for tier in fetch.admitted:
                    held[tier].remove(fetch.key)
            else:
                manager.arrived(fetch, SLOT if fetch.source is Tier.DISK else 0)
                from_disk += SLOT if fetch.source is Tier.DISK else 0
        manager.finish()
        manager.check_integrity()
        for cache in manager.caches:
            assert set(cache.resident()) == held[cache.tier]
    fast = manager.stats[manager.computing.tier]
    assert fast.hits + fast.misses == accesses and fast.late_hits == 0
    assert manager.bytes_from_disk == from_disk
    if tiers == 2:
        slow = manager.stats[Tier.CPU]
        assert slow.hits + slow.misses == fast.misses
    assert all(min(astuple(stats)) >= 0 and stats.bypasses <= stats.misses for stats in manager.stats.values())


class _Faulty(EvictionPolicy):
    """Ranks nothing: every priority is not a number."""

    def priorities(self, lanes: slice) -> Any:
        return np.full((1, self.lanes.width), np.nan)


def test_after_a_faulty_policy_nothing_is_left_pinned_or_pending() -> None:
    manager = Manager(Stacks.single([ExpertCache(Tier.CPU, [3 * SLOT], _Faulty(Lanes.shared(LAYERS, EXPERTS)))], SLOT))
    run(manager, by_hand.event(0, [0, 1]))
    plan = manager.step(by_hand.event(0, [1, 2, 3]))  # 2 finds room; for 3 the policy must choose
    assert isinstance(plan.error, PolicyError) and "not a number" in str(plan.error)
    for fetch in plan.fetches:  # what was begun is carried out, or given up, before the error is raised
        manager.failed(fetch)
    manager.finish()
    manager.check_integrity()
    assert run(manager, by_hand.event(0, [1])).resident == [K(0, 1)]
