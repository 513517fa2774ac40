"""The one decision loop: a routing event in, a layer plan out.

It knows ids, bytes and tiers, and neither tensors nor clocks. Live, the transfer engine carries out the fetches of its
plans; a replay moves a clock instead. Single-threaded by contract: the thread that computes makes every call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from cache.quota import Quota
from cache.residency import ExpertCache
from cache.stats import TierStats
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.ahead import Ahead
from offload.decide.behind import Behind
from offload.decide.fallbacks.base import Fallback
from offload.decide.fetching import Fetching, urgency
from offload.decide.log import Decision
from offload.decide.pace import Pace, PassTime
from offload.decide.placements.base import place
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.prefill import Prefill
from offload.decide.schedulers.base import Costs
from offload.decide.serving import Serving
from offload.decide.sharing import Sharing
from offload.decide.split import Split
from offload.decide.stacks import Stacks


class Manager:
    """Decides for every event how each member is served and where, what is fetched, and what goes to make room.

    Without a `fallback` every member is served at the best precision; without a `prefetcher` everything is fetched on
    demand; without a `prefill` prompts are read as replies are made, and one that streams needs a prefetcher, if only
    one that predicts nothing by itself; without a `split` everything is computed on the first tier; without a `quota`,
    which takes a lane for every layer, lanes stay as they are. Whoever changes one of these does so between events.
    `super_experts` are always served at their target and, once the computing tier holds them, never evicted.
    """

    def __init__(
        self,
        stacks: Stacks,
        *,
        fallback: Fallback | None = None,
        prefetcher: Prefetcher | None = None,
        prefill: Prefill | None = None,
        split: Split | None = None,
        quota: Quota | None = None,
        super_experts: Collection[ExpertKey] = (),
    ) -> None:
        self.stacks = stacks
        self.prefetcher = prefetcher
        self.prefill = prefill
        self.split = split
        self.stats = {tier: TierStats() for tier in stacks.tiers}
        self.bytes_from_disk = 0
        self.log: list[Decision] | None = None
        """Every decision from now on, if this is a list."""
        self.pace = Pace()
        """How fast passes go, for fallbacks that ask."""
        self.serving = Serving(stacks, fallback, super_experts, self.pace)
        lanes = stacks.caches[0].policy.lanes
        self.uses = [[0] * lanes.experts for _ in range(lanes.num_layers)]
        """How many events used each expert, by layer, since the start."""
        self._fetching = Fetching(stacks, self.stats, self._count_evicted)
        self._behind = Behind(stacks, self._count_evicted)
        self._ahead = Ahead(stacks, self.stats, self.serving, self._count_evicted)
        self.sharing: Sharing | None = None
        self.share_by(quota)

    @property
    def caches(self) -> list[ExpertCache]:
        """Those of the first slice, from the tier that computes to the slowest."""
        return self.stacks.by_slice[0]

    @property
    def computing(self) -> ExpertCache:
        """The first slice's cache of the tier that computes."""
        return self.stacks.by_slice[0][0]

    def share_by(self, quota: Quota | None) -> None:
        """From the next event on, divide every cache among layers as `quota` says."""
        self.sharing = None if quota is None else Sharing(quota, self.stacks, self._count_evicted)

    def place(self, order: Sequence[ExpertKey]) -> Iterator[Fetch]:
        """Before the first event: reserve places for the experts of `order`, as far as there is room; gives the fetches
        that bring them there, every one of which is to be carried out."""
        if self.sharing is not None and order:
            self.sharing.begin()
        return place(self.stacks, order)

    @property
    def uses_residents(self) -> bool:
        """Whether an event whose experts are all resident can only use each where it computes now.

        Nothing takes their places before the event after that one.
        """
        return self.stacks.plain and self.split is None

    @property
    def listens(self) -> bool:
        """Whether somebody wants to know, before a pass's first layer, what it reads."""
        return self.prefetcher is not None and self.prefetcher.reads

    def begin(self, event: RoutingEvent) -> LayerPlan:
        """A pass begins, as `cache.types.before_first` says it: a plan of nothing but prefetches. Only if it
        `listens`."""
        assert self.prefetcher is not None
        plan = self._ahead.begin(self.prefetcher, event, self._costs)
        if self.log is not None:
            self.log.append(Decision.of(plan))
        return plan

    def step(self, event: RoutingEvent) -> LayerPlan:
        """Look up every expert against the state before the event, then decide, reserve and evict for it.

        Until `finish`, nothing the event needs can be evicted. What does not fit is planned as streamed. Fetches start
        with the experts of most tokens, then with those of the highest weight.
        """
        plan, stacks = LayerPlan(event), self.stacks
        uses = self.uses[event.layer]
        for expert in event.experts:
            uses[expert] += 1
        stats = self.stats[stacks.computing]
        try:
            if self.sharing is not None:
                self.sharing.observe(plan)
            asked = self.serving.look_up(plan, stats)
            for cache in stacks.caches:
                # Every tier's policy sees every use: what the computing tier drops, the next one should still have.
                cache.policy.on_event(event)
            if self.prefill is not None:
                self.prefill.observe(event, stacks.caches)
            if asked:
                self.serving.choose(plan, asked)
            prefetcher = self.prefetcher
            if prefetcher is not None and not prefetcher.concerned(event):
                prefetcher = None
            if prefetcher is not None:
                self._ahead.observe(prefetcher, plan, self.prefill)
                if prefetcher.streams:
                    # What was computed before gives its place to the next layer, not to a member that would not stay.
                    self._use(plan)
                    self._ahead.plan(prefetcher, plan, self._costs)
            order: Sequence[ExpertKey] = ()
            if self.split is not None:
                order = self.split.divide(plan, stacks)
                stats.on_cpu += len(plan.on_cpu)
            if plan.waiting or plan.on_cpu:
                if stacks.nested:
                    # What is held of members that wait for other slices must not go to make room for these.
                    self.serving.hold(plan)
                self._fetching.plan(plan, order or urgency(plan))
            if plan.later:
                self._use(plan)
                # The better precisions of what the fallback degraded, for events to come.
                self._behind.plan(plan)
            if prefetcher is not None and not prefetcher.streams:
                self._use(plan)
                self._ahead.plan(prefetcher, plan, self._costs)
        except Exception as error:  # a user's own policy, predictor, fallback or scheduler may raise anything
            plan.error = error
        self.serving.count(plan)
        self._use(plan)
        if self.log is not None:
            self.log.append(Decision.of(plan))
        return plan

    def arrived(self, fetch: Fetch, bytes_from_disk: int) -> None:
        """The bytes of `fetch` are where they compute, and in every tier that admitted them. A super expert stays from
        now on."""
        for cache in self.stacks.by_slice[fetch.slice]:
            if cache.tier is fetch.source:
                break
            if fetch.to_host and cache.tier is self.stacks.computing:
                continue
            if cache.tier in fetch.admitted:
                cache.commit(fetch.key)
            self.stats[cache.tier].bytes_in += self.stacks.sizes[fetch.slice]
        self.bytes_from_disk += bytes_from_disk
        if self.prefetcher is not None or self._behind.flights:
            self._ended(fetch)
        supers = self.serving.super_experts
        if supers and fetch.key in supers and self.stacks.computing in fetch.admitted:
            self.stacks.by_slice[fetch.slice][0].pin(fetch.key)
        if self.log is not None:
            self.log[-1].completions.append((fetch.key, fetch.slice, True))

    def failed(self, fetch: Fetch) -> None:
        """The bytes of `fetch` will not come: its reservations are given back."""
        for cache in self.stacks.by_slice[fetch.slice]:
            if cache.tier in fetch.admitted:
                cache.abort(fetch.key)
        if self._ended(fetch) and self.prefetcher is not None:
            self.prefetcher.abandoned(fetch)
        if self.log is not None:
            self.log[-1].completions.append((fetch.key, fetch.slice, False))

    def cancelled(self, fetch: Fetch) -> None:
        """A prefetch was taken back before it had begun."""
        self.stats[self.stacks.computing].cancelled_prefetches += 1
        self.failed(fetch)

    def passed(self, time: PassTime) -> None:
        """A forward pass is over, and this is where its time went."""
        self.pace.update(time)
        for part in (self.prefetcher, self.split):
            if part is not None:
                part.passed(time)
        if self.log:
            self.log[-1].passed = time

    def finish(self) -> None:
        """The event is over, or was given up: what it used may be evicted again, super experts excepted."""
        self.serving.release()
        for cache in self.stacks.caches:
            cache.use(())

    def clear(self) -> None:
        """Between events: empty every cache and let every policy forget, as before the first event; counters go on."""
        for cache in self.stacks.caches:
            cache.clear()
        self._reset_parts()

    def start_over(self) -> None:
        """As `clear`, at any time and in whatever state an error has left this. Nothing may be on its way."""
        for cache in self.stacks.caches:
            cache.start_over()
        self.serving.forget()
        self._behind.flights.clear()
        self._reset_parts()

    def _reset_parts(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.reset()
        if self.prefill is not None:
            self.prefill.reset(self.stacks.caches)
        if self.split is not None:
            self.split.reset()
        if self.sharing is not None:
            self.sharing.reset()

    def reset_stats(self) -> None:
        """Count from zero; caches and policies stay as they are."""
        self.stats.update((tier, TierStats()) for tier in self.stats)
        self.bytes_from_disk = 0
        self.serving.reset()
        for cache in self.stacks.caches:
            cache.reset_peak()

    def check_integrity(self) -> None:
        """Between events, with nothing on its way: raise RuntimeError if a cache is inconsistent, pinned or waiting."""
        supers, flights = self.serving.super_experts, self._behind.flights
        for cache in self.stacks.caches:
            cache.check_integrity(idle=not supers and not flights)
            if not flights and (cache.pending() or not supers.issuperset(cache.pinned())):
                raise RuntimeError(f"{cache.tier.value} cache: pending {cache.pending()}, pinned {cache.pinned()}")

    @property
    def _costs(self) -> Costs | None:
        return None if self.split is None else self.split.costs

    def _use(self, plan: LayerPlan) -> None:
        """Keep what the event needs of every slice, in every tier.

        Said anew before whatever makes room, and at the end: meanwhile precisions change, and `Fetching` keeps less.
        """
        keys: Sequence[ExpertKey] = plan.keys
        stacks = self.stacks
        if stacks.plain and not (plan.replaced or plan.skipped):
            for cache in stacks.caches:
                cache.use(keys)
            return
        for slice_, caches in enumerate(stacks.by_slice):
            using = [k for k in keys if plan.uses(k) and slice_ in stacks.precisions[plan.precision(k)]]
            for cache in caches:
                cache.use(using)

    def _count_evicted(self, tier: Tier, slice_: int, keys: Sequence[ExpertKey]) -> None:
        stats = self.stats[tier]
        stats.evictions += len(keys)
        if self.prefetcher is not None and tier is self.stacks.computing:
            stats.wasted_prefetches += self.prefetcher.evicted((key, slice_) for key in keys)

    def _ended(self, fetch: Fetch) -> bool:
        """Whether it was a prefetch. What nobody waited for kept its source from being evicted; now that may go."""
        behind = self._behind.ended(fetch)
        prefetched = not behind and self.prefetcher is not None and self.prefetcher.landed(fetch)
        if (behind or prefetched) and fetch.source is not Tier.DISK:
            self.stacks.cache(fetch.source, fetch.slice).unpin(fetch.key)
        return prefetched
