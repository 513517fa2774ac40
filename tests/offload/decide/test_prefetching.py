"""What is fetched ahead, decided without a model."""

from __future__ import annotations

import random
from collections.abc import Iterable

import by_hand
import pytest

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.types import ExpertKey, Tier
from offload.decide.manager import Manager
from offload.decide.parcel import SliceKey
from offload.decide.plan import Fetch
from offload.decide.prefetch import Prefetcher
from offload.decide.stacks import Stacks
from predictors.base import make_predictor


@pytest.mark.parametrize("depth", [1, 3])
def test_nothing_is_prefetched_that_the_event_still_holds(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under policies that bypass, members give places up late; what late fetches evict keeps its slot until then."""
    rng = random.Random(depth)
    planned = late = 0
    for _ in range(60):
        caches = []
        for tier, slots in ((Tier.GPU, rng.randint(2, 9)), (Tier.CPU, rng.randint(2, 12))):
            policy = make_policy("stubborn_policy:Stubborn", Lanes.shared(3, 8, slots))
            caches.append(ExpertCache(tier, [slots], policy))
        predictor = make_predictor("wild_predictor:Wild", 3, 8)
        manager = Manager(Stacks.single(caches, 1), prefetcher=Prefetcher(predictor, depth, adaptive=False))
        assert manager.prefetcher is not None
        by_hand.believes_in_time(manager.prefetcher, monkeypatch)
        flying: list[Fetch] = []
        for step in range(90):
            experts = rng.sample(range(8), rng.randint(1, 4))
            plan = manager.step(by_hand.event(step % 3, experts, step // 3))
            held = set(plan.event.keys).union(*(v for f in plan.late_fetches for v in f.evicted.values()))
            assert plan.error is None and not {fetch.key for fetch in plan.prefetches} & held
            planned, late = planned + len(plan.prefetches), late + len(plan.late_fetches)
            for fetch in [f for f in flying if f.key in plan.awaited or rng.random() < 0.3]:
                flying.remove(fetch)
                manager.arrived(fetch, 0)
            for fetch in (*plan.fetches, *plan.late_fetches):
                manager.arrived(fetch, 0)
            flying += plan.prefetches
            manager.finish()
        for fetch in flying:
            manager.arrived(fetch, 0)
        manager.check_integrity()
    assert planned > 100 and late > 100


def test_what_is_on_its_way_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefetch that gave an expert's place up was wrong if that expert is missing, not if it is coming back."""
    rng = random.Random(0)
    policy = make_policy("lru", Lanes.shared(3, 8, 6))
    predictor = make_predictor("wild_predictor:Wild", 3, 8)
    prefetcher = Prefetcher(predictor, 1, adaptive=False)
    manager = Manager(Stacks.single([ExpertCache(Tier.GPU, [6], policy)], 1), prefetcher=prefetcher)
    by_hand.believes_in_time(prefetcher, monkeypatch)
    told: list[set[ExpertKey]] = []
    used = prefetcher.used

    def spy(slices: Iterable[SliceKey], missing: Iterable[SliceKey]) -> int:
        found = list(missing)
        told.append({key for key, _ in found})
        return used(slices, found)

    monkeypatch.setattr(prefetcher, "used", spy)
    awaited = 0
    for step in range(90):
        plan = manager.step(by_hand.event(step % 3, rng.sample(range(8), 2), step // 3))
        assert told[-1] == {fetch.key for fetch in (*plan.fetches, *plan.late_fetches)}
        awaited += len(plan.awaited)
        earlier = [flight.fetch for flight in prefetcher.flights.values() if flight.fetch not in plan.prefetches]
        for fetch in (*plan.fetches, *plan.late_fetches, *earlier):
            manager.arrived(fetch, 0)
        manager.finish()
    assert awaited > 10
