"""When layers' shares change, what goes for that, and what may be in the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from by_hand import event

from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import make_policy
from cache.quota import Quota
from cache.residency import ExpertCache
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.decide.stacks import Stacks

LAYERS, EXPERTS, SIZE = 2, 6, 10


class Turns(Quota):
    """Gives what the list says next, and stays with the last."""

    def __init__(self, *divisions: list[int], every_pass: bool = False) -> None:
        super().__init__(LAYERS, EXPERTS)
        self.every_pass = every_pass  # type: ignore[misc]
        self.divisions = list(divisions)
        self.asked = 0
        self.seen: list[RoutingEvent] = []

    def observe(self, event: RoutingEvent) -> None:
        self.seen.append(event)

    def divide(self, total: int) -> list[int]:
        self.asked += 1
        return self.divisions[min(self.asked, len(self.divisions)) - 1]


def manager_of(quota: Quota, slots: int = 6, *tiers: Tier) -> Manager:
    """Caches of so many experts in each tier, evenly divided at first."""
    caches = []
    for tier in tiers or (Tier.CPU,):
        lanes = Lanes.per_layer(LAYERS, EXPERTS, slots // LAYERS)
        caches.append(ExpertCache(tier, (lanes.slots * SIZE).tolist(), make_policy("lru", lanes)))
    return Manager(Stacks.single(caches, SIZE), quota=quota)


def step(manager: Manager, event: RoutingEvent, arrives: bool = True) -> LayerPlan:
    plan = manager.step(event)
    for fetch in (*plan.fetches, *plan.late_fetches) if arrives else ():
        manager.arrived(fetch, SIZE)
    manager.finish()
    return plan


def run(manager: Manager, *events: RoutingEvent) -> list[list[ExpertKey]]:
    """What each event dropped."""
    plans = [step(manager, each) for each in events]
    assert all(plan.error is None for plan in plans)
    manager.check_integrity()
    return [[key for each in plan.dropped for key in each.keys] for plan in plans]


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def of(sequence: int, step: int, layer: int, *experts: int, phase: Phase = Phase.DECODE) -> RoutingEvent:
    return event(layer, experts, step)._replace(sequence=sequence, phase=phase)


def test_before_the_first_event_and_before_each_prompt() -> None:
    quota = Turns([3, 3], [1, 5], [4, 2])
    manager = manager_of(quota)
    assert run(manager, of(0, 0, 0, 0, 1, 2), of(0, 0, 1, 0, 1, 2), of(0, 1, 0, 0, 1, 2), of(0, 1, 1, 2)) == [[]] * 4
    assert quota.asked == 1
    # What the event needs stays; of the others the least recently used goes first.
    assert run(manager, of(1, 0, 0, 1)) == [keys(0, 0, 2)]
    assert manager.computing.capacities == [10, 50] and manager.computing.resident() == keys(0, 1) + keys(1, 0, 1, 2)
    assert run(manager, of(1, 1, 0, 1), of(1, 1, 1, 3, 4)) == [[], []] and quota.asked == 2
    assert run(manager, of(1, 2, 0, 1, phase=Phase.PREFILL)) == [keys(1, 0, 1, 2)], "a further prompt in a conversation"
    assert run(manager, of(1, 3, 0, 1, phase=Phase.PREFILL)) == [[]] and quota.asked == 3, "the same, in chunks"
    assert len(quota.seen) == 9


def test_before_each_pass() -> None:
    quota = Turns([3, 3], [2, 4], [5, 1], every_pass=True)
    manager = manager_of(quota)
    dropped = run(manager, of(0, 0, 0, 0, 1, 2), of(0, 0, 1, 0, 1, 2), of(0, 1, 0, 1, 2), of(0, 1, 1, 3))
    assert dropped == [[], [], keys(0, 0), []] and quota.asked == 2
    assert run(manager, of(0, 2, 0, 0)) == [keys(1, 0, 1, 2)]
    assert manager.stats[Tier.CPU].evictions == 4


def test_what_is_in_the_way_puts_it_off() -> None:
    manager = manager_of(Turns([3, 3], [1, 5]))
    run(manager, of(0, 0, 0, 0, 1, 2), of(0, 0, 1, 0))
    assert run(manager, of(1, 0, 0, 1, 2)) == [[]], "the event needs two, and there would be one"
    assert manager.computing.capacities == [30, 30]
    assert run(manager, of(1, 0, 1, 0)) == [keys(0, 0, 1)]
    assert manager.computing.capacities == [10, 50]


def test_every_tier_is_divided_by_itself() -> None:
    quota = Turns([3, 3], [3, 3], [1, 5], [2, 4])
    manager = manager_of(quota, 6, Tier.GPU, Tier.CPU)
    run(manager, of(0, 0, 0, 0, 1, 2), of(0, 0, 1, 0))
    plan = step(manager, of(1, 0, 0, 2))
    assert [(each.tier, each.keys) for each in plan.dropped] == [(Tier.GPU, keys(0, 0, 1)), (Tier.CPU, keys(0, 0))]
    assert [cache.capacities for cache in manager.caches] == [[10, 50], [20, 40]]


def test_a_cold_start_forgets_and_divides_anew() -> None:
    quota = Turns([3, 3], [1, 5], [2, 4])
    manager = manager_of(quota)
    run(manager, of(0, 0, 0, 0), of(0, 0, 1, 0), of(1, 0, 0, 0))
    manager.clear()
    assert run(manager, of(2, 0, 0, 0)) == [[]] and manager.computing.capacities == [20, 40]


@pytest.mark.parametrize(
    "spoil", [lambda quota: setattr(quota, "divisions", [[9, 9]]), lambda quota: vars(quota).clear()]
)
def test_a_quota_that_fails_is_the_plans_error(spoil: Callable[[Quota], None]) -> None:
    quota = Turns([3, 3])
    manager = manager_of(quota)
    run(manager, of(0, 0, 0, 0), of(0, 0, 1, 0))
    quota.slots(6)
    spoil(quota)
    plan = step(manager, of(1, 0, 0, 0))
    assert isinstance(plan.error, (PolicyError, AttributeError))
    assert manager.computing.capacities == [30, 30]
    manager.check_integrity()
