"""Fetches of nested experts: what of an event is late is late as a whole, and what gives its place up goes first."""

from __future__ import annotations

import by_hand

from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.decide.stacks import Stacks

K = ExpertKey
SIZES = [20, 10]


def manager_of(*slots: dict[Tier, int]) -> Manager:
    """Experts of two slices, with so many places for each in each tier; both are wanted of every expert."""
    stacks = [
        [by_hand.cache_of(tier, count, nbytes, 2, 8) for tier, count in tiers.items()]
        for tiers, nbytes in zip(slots, SIZES, strict=True)
    ]
    return Manager(Stacks(stacks, SIZES, [(0, 1), (0,)]))


def carry_out(manager: Manager, event: RoutingEvent) -> LayerPlan:
    plan = manager.step(event)
    assert plan.error is None
    for fetch in (*plan.fetches, *plan.late_fetches):
        manager.arrived(fetch, 0)
    manager.finish()
    return plan


def test_an_expert_with_a_late_slice_is_late_with_all_others() -> None:
    """Else first slices could hold all staging places, and the second ones never come."""
    manager = manager_of({Tier.CPU: 4}, {Tier.CPU: 2})
    carry_out(manager, by_hand.event(0, [0, 1]))
    plan = carry_out(manager, by_hand.event(0, [0, 2, 1, 3]))
    # The first slices have room. Of the second ones 3's takes the place of 0's, once 0 has been computed.
    assert plan.resident == [K(0, 0), K(0, 1)] and plan.fetches == []
    assert [(f.key, f.slice) for f in plan.late_fetches] == [(K(0, 3), 0), (K(0, 3), 1), (K(0, 2), 0), (K(0, 2), 1)]
    assert [f.evicted for f in plan.late_fetches] == [{}, {Tier.CPU: [K(0, 0)]}, {}, {}]


def test_all_slices_of_an_expert_come_one_after_the_other() -> None:
    plan = carry_out(manager_of({Tier.CPU: 4}, {Tier.CPU: 2}), by_hand.event(0, [5, 6, 7]))
    assert [(f.key.expert, f.slice) for f in plan.fetches] == [(e, s) for e in (7, 6, 5) for s in (0, 1)]


def test_of_each_slice_all_places_are_given_up_before_the_first_fetch() -> None:
    manager = manager_of(*[{Tier.GPU: 2, Tier.CPU: 2}] * 2)
    carry_out(manager, by_hand.event(0, [0, 1]))
    plan = carry_out(manager, by_hand.event(0, [0, 2, 1, 3]))
    # 3 takes 0's place on the accelerator late, and 2 none: so they change places, and 3 comes first in RAM, too.
    assert [(f.key, f.slice) for f in plan.late_fetches] == [(K(0, 3), 0), (K(0, 3), 1), (K(0, 2), 0), (K(0, 2), 1)]
    gone = {Tier.GPU: [K(0, 0)], Tier.CPU: [K(0, 0), K(0, 1)]}
    assert [f.evicted for f in plan.late_fetches] == [gone, gone, {}, {}]
