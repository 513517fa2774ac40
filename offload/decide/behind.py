"""Fetches that no event waits for, behind everything else: of what was served below its target, so that the next event
finds it as it should be, and of what a policy exchanges. Torch-free, part of the decision loop."""

from __future__ import annotations

from collections.abc import Iterator

from cache.residency import State
from cache.types import ExpertKey, Tier
from offload.decide.fetching import Evicted
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.stacks import Stacks


class Behind:
    """Plans them where there is room, and knows those under way. `evicted` is told of every eviction."""

    def __init__(self, stacks: Stacks, evicted: Evicted) -> None:
        self._stacks = stacks
        self._evicted = evicted
        self.flights: dict[tuple[ExpertKey, int], Fetch] = {}
        """Those under way, by expert and slice."""
        self._exchanges = any(caches[0].policy.exchanges for caches in stacks.by_slice)
        self._exchanged: list[tuple[ExpertKey, int]] = []  # by the policies, when the last event was touched

    def due(self, plan: LayerPlan) -> bool:
        """An event has been touched: whether there is anything to plan."""
        return self._exchanges or bool(plan.later)

    def plan(self, plan: LayerPlan) -> None:
        """Add to a plan what its members `later` need for their targets; no more at once than an event has members. And
        what the computing tier's policies exchanged in the event before: that is over, and uses nothing any more."""
        for key in plan.later:
            for slice_ in self._stacks.precisions[plan.targets[key]]:
                missing = self._stacks.by_slice[slice_][0].state(key) is State.MISS
                if missing and len(self.flights) < len(plan.event.experts):
                    self._reserve(plan, key, slice_)

        for key, slice_ in self._exchanged:
            if self._stacks.by_slice[slice_][0].state(key) is State.MISS:
                self._reserve(plan, key, slice_)
        self._exchanged = list(self._exchange()) if self._exchanges else []

    def reset(self) -> None:
        """Forget what was going on. Nothing may be on its way."""
        self.flights.clear()
        self._exchanged = []

    def _exchange(self) -> Iterator[tuple[ExpertKey, int]]:
        """What the policies bring in, by slice."""
        for slice_, caches in enumerate(self._stacks.by_slice):
            policy = caches[0].policy
            for come, _ in policy.exchange():
                yield from ((ExpertKey(*divmod(at, policy.num_experts)), slice_) for at in come.tolist())

    def ended(self, fetch: Fetch) -> bool:
        """Whether `fetch`, which has ended, was one of them."""
        if self.flights.get((fetch.key, fetch.slice)) is not fetch:
            return False
        del self.flights[fetch.key, fetch.slice]
        return True

    def _reserve(self, plan: LayerPlan, key: ExpertKey, slice_: int) -> None:
        caches, nbytes = self._stacks.by_slice[slice_], self._stacks.sizes[slice_]
        if any(fetch.key == key and fetch.slice == slice_ for fetch in (*plan.fetches, *plan.late_fetches)):
            return
        for fetch in plan.late_fetches:
            if fetch.slice == slice_ and any(key in victims for victims in fetch.evicted.values()):
                return  # it keeps its slot until they start, which is later
        source = self._stacks.source(key, slice_)
        above = []
        for cache in caches:
            if cache.tier is source:
                break
            if cache.state(key) is State.PENDING or cache.victims(key, nbytes) is None:
                return
            above.append(cache)
        fetch = Fetch(key, source, tuple(cache.tier for cache in above), slice=slice_)
        for cache in above:
            evicted = cache.reserve(key, nbytes)
            if evicted:
                fetch.evicted[cache.tier] = evicted
                self._evicted(cache.tier, slice_, evicted)
        if source is not Tier.DISK:
            self._stacks.cache(source, slice_).pin(key)
        self.flights[key, slice_] = fetch
        plan.prefetches.append(fetch)
