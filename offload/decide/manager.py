"""The one decision loop: a routing event in, a layer plan out.

It knows ids, bytes and tiers, and neither tensors nor clocks. Live, the transfer engine carries out the fetches of its
plans; a replay moves a clock instead. Single-threaded by contract: the thread that computes makes every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cache.residency import ExpertCache, State
from cache.stats import TierStats
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.log import Decision
from offload.decide.pace import PassTime
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.prefill import Prefill
from offload.decide.split import Split


class Manager:
    """Decides for every event what is used where it lies, what is fetched, and what goes to make room.

    `caches` lists the tiers from the one that computes to the slowest; the disk behind them holds everything.
    `slot_bytes` is what one expert takes in any of them. Without a `prefetcher` everything is fetched on demand;
    without a `prefill` prompts are read as replies are made, and one that streams needs a prefetcher, if only one that
    predicts nothing by itself; without a `split` everything is computed on the first tier. Whoever changes one of them
    does so between events.
    """

    def __init__(
        self,
        caches: Sequence[ExpertCache],
        slot_bytes: int,
        prefetcher: Prefetcher | None = None,
        prefill: Prefill | None = None,
        split: Split | None = None,
    ) -> None:
        self.caches = list(caches)
        self.slot_bytes = slot_bytes
        self.stacks = [self.caches]
        """The caches of each slice of the experts; `caches` are the first one's."""
        self.sizes = [slot_bytes]
        """Bytes of each slice."""
        self.prefetcher = prefetcher
        self.prefill = prefill
        self.split = split
        self.stats = {cache.tier: TierStats() for cache in caches}
        self.bytes_from_disk = 0
        self.log: list[Decision] | None = None
        """Every decision from now on, if this is a list."""

    @property
    def computing(self) -> ExpertCache:
        """The cache of the tier that computes."""
        return self.caches[0]

    def step(self, event: RoutingEvent) -> LayerPlan:
        """Look up every expert against the state before the event, then reserve and evict for it.

        Until `finish`, nothing the event needs can be evicted. What does not fit is planned as streamed. Fetches start
        with the experts of most tokens, then with those of the highest weight.
        """
        keys = event.keys
        computing = self.computing
        resident, awaited, missing = computing.look_up(keys)
        plan = LayerPlan(event, resident, awaited=awaited)
        stats = self.stats[computing.tier]
        stats.hits += len(resident)
        stats.late_hits += len(awaited)
        stats.misses += len(missing)
        try:
            for cache in self.caches:
                # Every tier's policy sees every use: what the computing tier drops, the next one should still have.
                cache.policy.on_event(event)
            if self.prefill is not None:
                self.prefill.observe(event, self.caches)
            prefetcher = self.prefetcher
            if prefetcher is not None and not prefetcher.concerned(event):
                prefetcher = None
            if prefetcher is not None:
                self._predict(prefetcher, event, keys, missing)
            if prefetcher is not None and prefetcher.streams:
                # What was computed before gives its place to the next layer, not to a member that would not stay.
                self._use(keys)
                self._plan_prefetches(prefetcher, plan)
            if missing or self.split is not None:
                self._plan_fetches(plan, keys, missing)
            if prefetcher is not None and not prefetcher.streams:
                self._use(keys)
                self._plan_prefetches(prefetcher, plan)
        except Exception as error:  # a user's own policy or predictor may raise anything
            plan.error = error
        self._use(keys)
        if self.log is not None:
            self.log.append(Decision.of(plan))
        return plan

    def arrived(self, fetch: Fetch, bytes_from_disk: int) -> None:
        """The bytes of `fetch` are where they compute, and in every tier that admitted them."""
        for cache in self.stacks[fetch.slice]:
            if cache.tier is fetch.source:
                break
            if fetch.to_host and cache is self.computing:
                continue
            if cache.tier in fetch.admitted:
                cache.commit(fetch.key)
            self.stats[cache.tier].bytes_in += self.sizes[fetch.slice]
        self.bytes_from_disk += bytes_from_disk
        self._ended(fetch)
        if self.log is not None:
            self.log[-1].completions.append((fetch.key, fetch.slice, True))

    def failed(self, fetch: Fetch) -> None:
        """The bytes of `fetch` will not come: its reservations are given back."""
        for cache in self.stacks[fetch.slice]:
            if cache.tier in fetch.admitted:
                cache.abort(fetch.key)
        if self._ended(fetch) and self.prefetcher is not None:
            self.prefetcher.abandoned(fetch.key)
        if self.log is not None:
            self.log[-1].completions.append((fetch.key, fetch.slice, False))

    def cancelled(self, fetch: Fetch) -> None:
        """A prefetch was taken back before it had begun."""
        self.stats[self.computing.tier].cancelled_prefetches += 1
        self.failed(fetch)

    def passed(self, time: PassTime) -> None:
        """A forward pass is over, and this is where its time went."""
        for part in (self.prefetcher, self.split):
            if part is not None:
                part.passed(time)
                if self.log:
                    self.log[-1].passed = time

    def finish(self) -> None:
        """The event is over, or was given up: what it used may be evicted again."""
        for caches in self.stacks:
            for cache in caches:
                cache.use(())

    def clear(self) -> None:
        """Between events: empty every cache and let every policy forget, as before the first event; counters go on."""
        for cache in self._all():
            cache.clear()
        if self.prefetcher is not None:
            self.prefetcher.reset()
        if self.prefill is not None:
            self.prefill.reset(self.caches)
        if self.split is not None:
            self.split.reset()

    def reset_stats(self) -> None:
        """Count from zero; caches and policies stay as they are."""
        self.stats = {cache.tier: TierStats() for cache in self.caches}
        self.bytes_from_disk = 0
        for cache in self._all():
            cache.reset_peak()

    def check_integrity(self) -> None:
        """Between events, with nothing on its way: raise RuntimeError if a cache is inconsistent, pinned or waiting."""
        for cache in self._all():
            cache.check_integrity(idle=True)

    def _all(self) -> Iterator[ExpertCache]:
        return (cache for caches in self.stacks for cache in caches)

    def _predict(
        self, prefetcher: Prefetcher, event: RoutingEvent, keys: Sequence[ExpertKey], missing: Sequence[ExpertKey]
    ) -> None:
        """Let the prefetcher see an event, and keep what it expects next."""
        self.stats[self.computing.tier].useful_prefetches += prefetcher.used(keys, missing)
        streamed = self.prefill.ahead(event) if self.prefill is not None and self.prefill.streams else ()
        expected = prefetcher.observe(event, streamed)
        for cache in self.caches:
            cache.favour(expected)

    def _use(self, keys: Sequence[ExpertKey]) -> None:
        for cache in self.caches:
            cache.use(keys)

    def _plan_prefetches(self, prefetcher: Prefetcher, plan: LayerPlan) -> None:
        before = len(plan.prefetches)
        try:
            prefetcher.plan(plan, self.caches, None if self.split is None else self.split.costs)
        finally:  # what was planned until an error is carried out
            planned = plan.prefetches[before:]
            self.stats[self.computing.tier].prefetches += len(planned)
            for fetch in planned:
                for tier, victims in fetch.evicted.items():
                    self._count_evicted(tier, victims)

    def _plan_fetches(
        self, plan: LayerPlan, keys: Sequence[ExpertKey], missing: list[ExpertKey], slice_: int = 0
    ) -> None:
        """Fetch a slice of `missing`, of the `keys` that the event uses it of; or let the CPU compute where it is."""
        caches = self.stacks[slice_]
        plan.fetches = [Fetch(key, self._look_up(key, slice_), slice=slice_) for key in reversed(missing)]
        event = plan.event
        if sum(event.tokens) > len(event.experts) and len(missing) > 1:
            tokens = dict(zip(event.experts, event.tokens, strict=True))
            # `missing` ascends in weight, and sorting is stable: of equal token counts, the highest weight comes first.
            plan.fetches.sort(key=lambda fetch: -tokens[fetch.key.expert])
        sources = {fetch.key: fetch.source for fetch in plan.fetches}
        members, passing = keys, len(missing)
        if self.split is not None:
            self._divide(self.split, plan)
            on_cpu = set(plan.on_cpu)
            members = [key for key in keys if key not in on_cpu]
            passing = sum(not fetch.to_host for fetch in plan.fetches)
        self._admit(plan, caches[0], members, passing, slice_)
        if len(caches) == 1:
            return
        for cache in caches[1:]:
            # What a slower tier is asked for is copied from there, and stays.
            asked = [key for key in missing if sources[key] is cache.tier]
            read = [key for key in missing if sources[key] is not cache.tier]
            if read:
                cache.use([*asked, *plan.on_cpu])
                self._admit(plan, cache, read, len(read), slice_)

    def _divide(self, split: Split, plan: LayerPlan) -> None:
        computing, host = self.caches[:2]
        room = computing.free_bytes(plan.event.layer) // self.slot_bytes
        split.divide(plan, room, lambda key: host.state(key) is State.RESIDENT)
        self.stats[computing.tier].on_cpu += len(plan.on_cpu)

    def _admit(
        self, plan: LayerPlan, cache: ExpertCache, members: Sequence[ExpertKey], passing: int, slice_: int
    ) -> None:
        """Ask `cache` which of `members` it keeps, of whom so many pass it, and note in the plan what that takes."""
        admission = cache.admit(members, self.sizes[slice_])
        stats = self.stats[cache.tier]
        stats.bypasses += passing - len(admission.admitted)
        if not admission.admitted:
            return
        kept = [*plan.fetches, *plan.late_fetches]
        if len(admission.admitted) < len(kept):
            kept = [fetch for fetch in kept if fetch.key in admission.admitted]
        for fetch in kept:
            fetch.admitted += (cache.tier,)
        if admission.evicted:
            self._count_evicted(cache.tier, admission.evicted, slice_)
            kept[0].evicted[cache.tier] = admission.evicted
        if admission.surrendered:
            self._count_evicted(cache.tier, admission.surrendered, slice_)
            late = kept[-len(admission.surrendered) :]
            late[0].evicted.setdefault(cache.tier, []).extend(admission.surrendered)
            plan.fetches = [fetch for fetch in plan.fetches if fetch not in late]
            plan.late_fetches = late

    def _count_evicted(self, tier: Tier, keys: list[ExpertKey], slice_: int = 0) -> None:
        """What is prefetched are first slices: those of another one may go without anything being wasted."""
        stats = self.stats[tier]
        stats.evictions += len(keys)
        if self.prefetcher is not None and tier is self.computing.tier and slice_ == 0:
            stats.wasted_prefetches += self.prefetcher.evicted(keys)

    def _ended(self, fetch: Fetch) -> bool:
        """Whether it was a prefetch; then its source may be evicted again."""
        if self.prefetcher is None or not self.prefetcher.landed(fetch):
            return False
        for cache in self.stacks[fetch.slice]:
            if cache.tier is fetch.source:
                cache.unpin(fetch.key)
        return True

    def _look_up(self, key: ExpertKey, slice_: int) -> Tier:
        """The nearest slower tier that has the slice's bytes, counted there."""
        for cache in self.stacks[slice_][1:]:
            stats = self.stats[cache.tier]
            if cache.state(key) is State.RESIDENT:
                stats.hits += 1
                return cache.tier
            stats.misses += 1
        return Tier.DISK
