"""A manager of several precisions that is told anything, and a carrier that lets transfers land in any order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import by_hand

from cache.residency import State
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.fallbacks.base import SKIP, Candidate, Choice, Fallback
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, timed
from offload.decide.stacks import Stacks

K = ExpertKey
LAYERS, EXPERTS = 3, 8
APART, NESTED = ((0,), (1,)), ((0, 1), (0,))


class Dice(Fallback):
    """Any choice there is, at random; a precision without slices to fetch as often as others."""

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.random = random.Random(3)

    def target(self, key: ExpertKey) -> int:
        return (key.layer * 5 + key.expert) % 4 == 0

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        for candidate in candidates:
            assert 0 <= candidate.before < 1 and 0 < candidate.share <= 1
            assert candidate.held is None or candidate.held > candidate.target
        return [
            Choice(self.random.choice([*range(c.target, self.precisions), SKIP]), later=self.random.random() < 0.5)
            for c in candidates
        ]


def manager_of(
    precisions: Sequence[Sequence[int]], slots: Sequence[dict[Tier, int]], fallback: Fallback | None = None, **more: Any
) -> Manager:
    stacks = [
        [by_hand.cache_of(tier, count, 10 * (i + 1), LAYERS, EXPERTS) for tier, count in tiers.items()]
        for i, tiers in enumerate(slots)
    ]
    sizes = [10 * (i + 1) for i in range(len(slots))]
    fallback = fallback or Dice(LAYERS, EXPERTS, len(precisions))
    return Manager(Stacks(stacks, sizes, precisions), fallback=fallback, **more)


class Coin(Scheduler):
    """Any processor and any option that a load has, at random."""

    name = "coin"

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(5)

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        raise AssertionError("it serves")

    def serve(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        gpu: list[int] = []
        cpu: list[int] = []
        served: dict[int, int] = {}
        for i, load in enumerate(loads):
            now = load
            assert load.left_out == (load.precision == SKIP)
            assert all(option.loss < load.loss or not load.loss for option in load.options)
            if load.options and self.random.random() < 0.5:
                served[i] = self.random.randrange(len(load.options))
                now = load.options[served[i]]
            if not now.left_out:
                on_cpu = now.cpu_ready_s < inf and self.random.random() < 0.5
                (cpu if on_cpu else gpu).append(i)
        self.random.shuffle(gpu)
        settled = [load.options[served[i]] if i in served else load for i, load in enumerate(loads)]
        return replace(timed(settled, costs, gpu, cpu), served=served)


COSTS = SplitCosts(lambda n: 1.0 * n, lambda n: 2.0 * n, 1.0, 3.0, 0.5, (1.0, 0.8, 0.7), (1.0, 0.9, 0.5))


class Carrier:
    """Carries plans out in a random order of landing, and checks that what is computed with is there."""

    def __init__(self, manager: Manager, seed: int) -> None:
        self.manager = manager
        self.random = random.Random(seed)
        self.behind: list[Fetch] = []
        self.slots: dict[tuple[int, Tier], set[ExpertKey]] = {}
        """Whose bytes have a slot, as the transfer engine keeps them."""

    def run(self, event: RoutingEvent) -> LayerPlan:
        manager = self.manager
        for fetch in [fetch for fetch in self.behind if self.random.random() < 0.3]:
            self.land(fetch)
        plan = manager.step(event)
        assert plan.error is None
        self.behind += plan.prefetches
        for fetches in (plan.fetches, plan.prefetches, plan.late_fetches):  # as they are started
            for fetch in fetches:
                self.start(fetch)
        tier = manager.computing.tier
        for key in plan.resident:
            for slice_ in manager.stacks.precisions[plan.precision(key)]:
                assert manager.stacks.by_slice[slice_][0].state(key) is State.RESIDENT or any(
                    key in fetch.evicted.get(tier, ()) and fetch.slice == slice_ for fetch in plan.late_fetches
                )
        for key in plan.on_cpu:
            for slice_ in set(manager.stacks.precisions[plan.precision(key)]) - set(plan.waiting.get(key, ())):
                assert manager.stacks.by_slice[slice_][1].state(key) is State.RESIDENT
        landed: dict[ExpertKey, set[int]] = {}
        urgent = [*plan.fetches, *plan.late_fetches]
        for fetch in [f for f in self.behind if f.slice in plan.waiting.get(f.key, ())]:
            self.behind.remove(fetch)
            urgent.append(fetch)
        self.random.shuffle(urgent)
        for fetch in urgent:
            manager.arrived(fetch, manager.stacks.sizes[fetch.slice] if fetch.source is Tier.DISK else 0)
            landed.setdefault(fetch.key, set()).add(fetch.slice)
        for key, waits in plan.waiting.items():
            assert set(waits) <= landed[key]
            for slice_ in set(manager.stacks.precisions[plan.precision(key)]) - landed[key]:
                assert manager.stacks.by_slice[slice_][key in plan.on_cpu].state(key) is State.RESIDENT
        served = Counter([*plan.resident, *plan.waiting, *plan.skipped, *plan.in_place()])
        assert served == Counter(event.keys)
        manager.finish()
        for caches in manager.stacks.by_slice:
            for cache in caches:
                cache.check_integrity()
        return plan

    def start(self, fetch: Fetch) -> None:
        """Slots change hands, and there is one for each that is admitted."""
        for tier, victims in fetch.evicted.items():
            for victim in victims:
                self.slots[fetch.slice, tier].remove(victim)
        for cache in self.manager.stacks.by_slice[fetch.slice]:
            if cache.tier in fetch.admitted:
                held = self.slots.setdefault((fetch.slice, cache.tier), set())
                assert fetch.key not in held
                held.add(fetch.key)
                assert len(held) * self.manager.stacks.sizes[fetch.slice] <= cache.capacity_bytes

    def land(self, fetch: Fetch) -> None:
        self.behind.remove(fetch)
        if self.random.random() < 0.2:
            for tier in fetch.admitted:
                self.slots[fetch.slice, tier].remove(fetch.key)
            self.manager.failed(fetch)
        else:
            self.manager.arrived(fetch, self.manager.stacks.sizes[fetch.slice] if fetch.source is Tier.DISK else 0)

    def settle(self) -> None:
        for fetch in list(self.behind):
            self.land(fetch)
        self.manager.check_integrity()


def events(count: int, seed: int) -> Iterator[RoutingEvent]:
    rng = random.Random(seed)
    for step in range(count):
        for layer in range(LAYERS):
            experts = rng.sample(range(EXPERTS), rng.randrange(1, 6))
            weights = sorted(rng.random() + 0.01 for _ in experts)
            tokens = [rng.choice([1, 1, 2, 3]) for _ in experts]
            yield by_hand.event(layer, experts, step, weights, tokens)
