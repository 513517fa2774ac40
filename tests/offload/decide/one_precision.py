"""A manager of experts of one precision, in one tier or two, and events that it carries out."""

from __future__ import annotations

import by_hand

from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.decide.stacks import Stacks

LAYERS, EXPERTS, SLOT = 3, 8, 64
K = ExpertKey


def manager_of(*slots: int, policy: str = "lru") -> Manager:
    """One tier: RAM with so many slots; two: GPU, then RAM."""
    tiers = [Tier.CPU] if len(slots) == 1 else [Tier.GPU, Tier.CPU]
    caches = [by_hand.cache_of(tier, n, SLOT, LAYERS, EXPERTS, policy) for tier, n in zip(tiers, slots, strict=True)]
    return Manager(Stacks.single(caches, SLOT))


def run(manager: Manager, event: RoutingEvent) -> LayerPlan:
    """One event whose transfers all succeed."""
    plan = manager.step(event)
    for fetch in (*plan.fetches, *plan.late_fetches):
        manager.arrived(fetch, SLOT if fetch.source is Tier.DISK else 0)
    manager.finish()
    manager.check_integrity()
    return plan
