"""What is done ahead of need: the prefetcher is told of events and of how passes begin, and plans. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from cache.residency import State
from cache.stats import TierStats
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.fetching import Evicted
from offload.decide.plan import LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.prefill import Prefill
from offload.decide.schedulers.base import Costs
from offload.decide.serving import Serving
from offload.decide.stacks import Stacks
from predictors.base import Prediction


class Ahead:
    """Stands between the decision loop and a prefetcher, and keeps the tiers' counts.

    `evicted` is told of every eviction.
    """

    def __init__(self, stacks: Stacks, stats: Mapping[Tier, TierStats], serving: Serving, evicted: Evicted) -> None:
        self._stacks = stacks
        self._stats = stats
        self._serving = serving
        self._evicted = evicted

    def begin(self, prefetcher: Prefetcher, event: RoutingEvent, costs: Costs | None) -> LayerPlan:
        """A forward pass begins, as `event` says: what to fetch before its first layer, and what to take back."""
        plan = LayerPlan(event)
        try:
            self._favour(prefetcher.begin(event))
            self.plan(prefetcher, plan, costs)
        except Exception as error:  # a user's own predictor or rule may raise anything
            plan.error = error
        return plan

    def observe(self, prefetcher: Prefetcher, plan: LayerPlan, prefill: Prefill | None) -> None:
        """Let the prefetcher see an event, and keep what it expects next."""
        event, stacks = plan.event, self._stacks
        if stacks.plain and not (plan.replaced or plan.skipped):
            slices = [(key, 0) for key in event.keys]
        else:
            own = [key for key in event.keys if plan.uses(key)]
            slices = [(key, slice_) for key in own for slice_ in stacks.precisions[plan.precision(key)]]
        waiting = ((key, slice_) for key, waits in plan.waiting.items() for slice_ in waits)
        missing = (each for each in waiting if stacks.by_slice[each[1]][0].state(each[0]) is State.MISS)
        self._stats[stacks.computing].useful_prefetches += prefetcher.used(slices, missing)
        streamed: Sequence[Prediction] = prefill.ahead(event) if prefill is not None and prefill.streams else ()
        self._favour(prefetcher.observe(event, streamed))

    def plan(self, prefetcher: Prefetcher, plan: LayerPlan, costs: Costs | None) -> None:
        """Add to `plan` what to fetch ahead."""
        before = len(plan.prefetches)
        try:
            prefetcher.plan(plan, self._stacks, self._serving.target, costs)
        finally:  # what was planned until an error is carried out
            planned = plan.prefetches[before:]
            self._stats[self._stacks.computing].prefetches += len(planned)
            for fetch in planned:
                for tier, victims in fetch.evicted.items():
                    self._evicted(tier, fetch.slice, victims)

    def _favour(self, expected: Collection[ExpertKey]) -> None:
        for cache in self._stacks.caches:
            cache.favour(expected)
