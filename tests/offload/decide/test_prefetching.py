"""What is fetched ahead, decided without a model."""

from __future__ import annotations

import random

import by_hand
import pytest

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.types import Tier
from offload.decide.manager import Manager
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
