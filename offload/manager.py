"""The one decision loop: a routing event in, a layer plan out.

It knows ids, bytes and tiers, and neither tensors nor clocks. Live, the transfer engine carries out the fetches of its
plans; a replay would move a clock instead. Single-threaded by contract: the thread that computes makes every call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cache.residency import ExpertCache, State
from cache.stats import TierStats
from cache.types import ExpertKey, RoutingEvent, Tier


@dataclass(slots=True)
class Fetch:
    """One expert's way to the tier that computes, decided but not yet travelled.

    `source` is the nearest tier that holds the bytes; `admitted` the tiers whose caches keep them, each with a place
    reserved; `evicted` the experts whose places those were. An expert that is not admitted to the computing tier is
    streamed: it goes to a staging slot, is used once and forgotten.
    """

    key: ExpertKey
    source: Tier
    admitted: tuple[Tier, ...]
    evicted: dict[Tier, list[ExpertKey]]


@dataclass(slots=True)
class LayerPlan:
    """What one event needs: experts resident where they compute, and fetches for the others, the most urgent first.

    `error` is what a policy raised while the plan was made. The fetches begun until then hold reservations, so they are
    carried out all the same; then it is raised.
    """

    event: RoutingEvent
    resident: list[ExpertKey] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    error: Exception | None = None


class Manager:
    """Decides for every event what is used where it lies, what is fetched, and what goes to make room.

    `caches` lists the tiers from the one that computes to the slowest; the disk behind them holds everything.
    `slot_bytes` is what one expert takes in any of them.
    """

    def __init__(self, caches: Sequence[ExpertCache], slot_bytes: int) -> None:
        self.caches = list(caches)
        self.slot_bytes = slot_bytes
        self.stats = {cache.tier: TierStats() for cache in caches}
        self.bytes_from_disk = 0
        self._pinned: list[tuple[ExpertCache, ExpertKey]] = []

    @property
    def computing(self) -> ExpertCache:
        """The cache of the tier that computes."""
        return self.caches[0]

    def step(self, event: RoutingEvent) -> LayerPlan:
        """Look up every expert against the state before the event, then reserve, evict and pin for it.

        Until `finish`, nothing the event needs can be evicted. What does not fit is planned as streamed. Room goes to
        the experts with the most tokens first, then to those of the highest weight.
        """
        plan = LayerPlan(event)
        # Nothing is fetched ahead of its event yet, so between events nothing is pending, and no hit is late.
        missing = [key for key in event.keys if self.computing.state(key) is not State.RESIDENT]
        holders = {key: self._holder(key) for key in missing}
        plan.resident = [key for key in event.keys if key not in holders]
        stats = self.stats[self.computing.tier]
        stats.hits += len(plan.resident)
        stats.misses += len(missing)
        try:
            self._pin_and_reserve(plan, holders)
        except Exception as error:  # a user's own policy may raise anything
            plan.error = error
        return plan

    def _pin_and_reserve(self, plan: LayerPlan, holders: dict[ExpertKey, Tier]) -> None:
        event, keys = plan.event, plan.event.keys
        for key in plan.resident:
            self._pin(self.computing, key)
        self.computing.policy.on_event(event)
        for cache in self.caches[1:]:
            self._look_up(cache, event, holders)
        tokens = dict(zip(keys, event.tokens, strict=True))
        # `keys` ascends in weight, and sorting is stable: of equal token counts, the highest weight comes first.
        urgent = list(holders)[::-1]
        urgent.sort(key=lambda key: -tokens[key])
        for key in urgent:
            fetch = Fetch(key, holders[key], (), {})
            plan.fetches.append(fetch)
            self._reserve(fetch, keys)

    def arrived(self, fetch: Fetch, bytes_from_disk: int) -> None:
        """The bytes of `fetch` are where they compute, and in every tier that admitted them."""
        for cache in self.caches:
            if cache.tier in fetch.admitted:
                cache.commit(fetch.key)
                self._pin(cache, fetch.key)
        for cache in self._passed(fetch):
            self.stats[cache.tier].bytes_in += self.slot_bytes
        self.bytes_from_disk += bytes_from_disk

    def failed(self, fetch: Fetch) -> None:
        """The bytes of `fetch` will not come: its reservations are given back."""
        for cache in self.caches:
            if cache.tier in fetch.admitted:
                cache.abort(fetch.key)

    def finish(self) -> None:
        """The event is over, or was given up: what it pinned may be evicted again."""
        for cache, key in self._pinned:
            cache.unpin(key)
        self._pinned.clear()

    def reset_stats(self) -> None:
        """Count from zero; caches and policies stay as they are."""
        self.stats = {cache.tier: TierStats() for cache in self.caches}
        self.bytes_from_disk = 0
        for cache in self.caches:
            cache.reset_peak()

    def check_integrity(self) -> None:
        """Between events: raise RuntimeError if any cache is inconsistent, pinned or waiting."""
        for cache in self.caches:
            cache.check_integrity(idle=True)

    def _holder(self, key: ExpertKey) -> Tier:
        """The nearest slower tier that has the expert's bytes."""
        for cache in self.caches[1:]:
            if cache.state(key) is State.RESIDENT:
                return cache.tier
        return Tier.DISK

    def _look_up(self, cache: ExpertCache, event: RoutingEvent, holders: dict[ExpertKey, Tier]) -> None:
        """Count and pin at a slower tier; it is only asked for what the faster ones lack."""
        stats = self.stats[cache.tier]
        # Its policy sees every use: what the computing tier drops should be what the next tier still has.
        cache.policy.on_event(event)
        for key, tier in holders.items():
            if tier is cache.tier:
                stats.hits += 1
                self._pin(cache, key)
            else:
                stats.misses += 1

    def _reserve(self, fetch: Fetch, protected: Collection[ExpertKey]) -> None:
        for cache in self._passed(fetch):
            victims = cache.reserve(fetch.key, self.slot_bytes, protected)
            if victims is None:
                self.stats[cache.tier].bypasses += 1
                continue
            self.stats[cache.tier].evictions += len(victims)
            fetch.admitted += (cache.tier,)
            if victims:
                fetch.evicted[cache.tier] = victims

    def _passed(self, fetch: Fetch) -> list[ExpertCache]:
        """The caches the bytes pass on their way from the fetch's source, fastest first."""
        passed = []
        for cache in self.caches:
            if cache.tier is fetch.source:
                break
            passed.append(cache)
        return passed

    def _pin(self, cache: ExpertCache, key: ExpertKey) -> None:
        cache.pin(key)
        self._pinned.append((cache, key))
