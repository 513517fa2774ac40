"""Super experts: once the computing tier has one, nothing takes its place."""

from __future__ import annotations

import pytest
import tiny

from cache.residency import State
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.decide.stacks import Stacks

SUPER = ExpertKey(0, 0)


def carry_out(manager: Manager, event: RoutingEvent) -> LayerPlan:
    plan = manager.step(event)
    for fetch in (*plan.fetches, *plan.late_fetches):
        manager.arrived(fetch, 0)
    manager.finish()
    return plan


@pytest.mark.parametrize("tiers", [(Tier.CPU,), (Tier.GPU, Tier.CPU)])
def test_a_super_expert_stays_while_all_others_come_and_go(tiers: tuple[Tier, ...]) -> None:
    caches = [tiny.cache_of(tier, 2, 64, 2, 4) for tier in tiers]
    manager = Manager(Stacks.single(caches, 64), super_experts=[SUPER])
    carry_out(manager, tiny.event(0, [0]))
    for experts in ([0, 1], [2, 3], [0, 1, 2]):
        plan = carry_out(manager, tiny.event(1, experts))
        assert [fetch.key.expert for fetch in plan.fetches if tiers[0] in fetch.admitted] == experts[-1:]
        assert manager.computing.state(SUPER) is State.RESIDENT
    assert carry_out(manager, tiny.event(0, [0])).resident == [SUPER]
