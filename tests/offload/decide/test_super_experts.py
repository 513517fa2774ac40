"""Super experts: once the computing tier has one, nothing takes its place."""

from __future__ import annotations

import by_hand
import pytest
from one_precision import SLOT, run

from cache.residency import State
from cache.types import ExpertKey, Tier
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks

SUPER = ExpertKey(0, 0)


@pytest.mark.parametrize("tiers", [(Tier.CPU,), (Tier.GPU, Tier.CPU)])
def test_a_super_expert_stays_while_all_others_come_and_go(tiers: tuple[Tier, ...]) -> None:
    caches = [by_hand.cache_of(tier, 2, SLOT, 2, 4) for tier in tiers]
    manager = Manager(Stacks.single(caches, SLOT), super_experts=[SUPER])
    run(manager, by_hand.event(0, [0]))
    for experts in ([0, 1], [2, 3], [0, 1, 2]):
        plan = run(manager, by_hand.event(1, experts))
        assert [fetch.key.expert for fetch in plan.fetches if tiers[0] in fetch.admitted] == experts[-1:]
        assert manager.computing.state(SUPER) is State.RESIDENT
    assert run(manager, by_hand.event(0, [0])).resident == [SUPER]
