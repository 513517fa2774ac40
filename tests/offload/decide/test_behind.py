"""Better precisions fetched behind an event that was served at lesser ones: how many at once, and what never."""

from __future__ import annotations

from collections.abc import Sequence

import by_hand

from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.fallbacks.base import Candidate, Choice, Fallback
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks

K = ExpertKey
LAYERS, EXPERTS, SLOT = 2, 8, 10


class HeldNow(Fallback):
    """What is held at the low precision is served so, and the better one fetched behind."""

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(0) if c.held is None else Choice(c.held, later=True) for c in candidates]


def manager_of(high: dict[Tier, int], low: dict[Tier, int], policy: str = "lru") -> Manager:
    stacks = [
        [by_hand.cache_of(tier, slots, SLOT, LAYERS, EXPERTS, policy) for tier, slots in tiers.items()]
        for tiers in (high, low)
    ]
    return Manager(Stacks(stacks, [SLOT, SLOT], [(0,), (1,)]), fallback=HeldNow(LAYERS, EXPERTS, 2))


def hold(manager: Manager, slice_: int, tier: Tier, *keys: ExpertKey) -> None:
    for key in keys:
        manager.stacks.cache(tier, slice_).reserve(key, SLOT)
        manager.stacks.cache(tier, slice_).commit(key)


def test_no_more_at_once_than_an_event_has_members() -> None:
    manager = manager_of({Tier.CPU: 8}, {Tier.CPU: 8})
    hold(manager, 1, Tier.CPU, *(K(0, expert) for expert in range(5)))
    flying = 0
    for experts in ([0], [1], [2, 3], [1, 4]):  # none of them lands meanwhile
        plan = manager.step(by_hand.event(0, experts))
        assert plan.later == [K(0, expert) for expert in experts] and plan.error is None
        flying += len(plan.prefetches)
        assert flying == (1 if len(experts) == 1 else 2)
        manager.finish()


def test_what_a_late_fetch_evicts_is_not_fetched_behind() -> None:
    """2 takes the place of 5, once that is computed; until then RAM still has what goes there."""
    for evicted, behind in ((K(0, 6), []), (K(1, 7), [K(0, 6)])):
        manager = manager_of({Tier.GPU: 2, Tier.CPU: 2}, {Tier.GPU: 1, Tier.CPU: 1}, "stubborn_policy:Stubborn")
        hold(manager, 0, Tier.GPU, K(0, 5), K(1, 0))  # low ids are worth more
        hold(manager, 0, Tier.CPU, evicted, K(1, 0))
        hold(manager, 1, Tier.GPU, K(0, 6))
        plan = manager.step(by_hand.event(0, [5, 6, 2]))
        assert plan.later == [K(0, 6)]
        assert [fetch.evicted for fetch in plan.late_fetches] == [{Tier.GPU: [K(0, 5)], Tier.CPU: [evicted]}]
        assert [fetch.key for fetch in plan.prefetches] == behind
