"""What one event fetches: slice by slice, which caches keep it, and what gives its place up. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cache.residency import ExpertCache, State
from cache.stats import TierStats
from cache.types import ExpertKey, Tier
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.stacks import Stacks

Evicted = Callable[[Tier, int, Sequence[ExpertKey]], None]
"""Is told what a tier's cache of a slice gave up."""


class Fetching:
    """Adds to a plan the fetches that its `waiting` members take, and reserves their places.

    `stats` count lookups in slower tiers and bypasses; `evicted` is told of every eviction. With `base_first` the
    slices of the lowest precision travel before those of others.
    """

    def __init__(
        self, stacks: Stacks, stats: Mapping[Tier, TierStats], evicted: Evicted, base_first: bool = False
    ) -> None:
        self._base = stacks.precisions[-1] if base_first else None
        self._stacks = stacks
        self._stats = stats
        self._evicted = evicted

    def plan(self, plan: LayerPlan, order: Sequence[ExpertKey]) -> None:
        """Fetch what members wait for and nobody brings yet, in this `order` of members.

        What was planned until an error is in the plan all the same, and is to be carried out.
        """
        stacks = self._stacks
        if stacks.plain and not (plan.on_cpu or plan.skipped or plan.replaced):  # the common case, in few steps
            awaited, waiting = plan.awaited, plan.waiting
            wanted = [key for key in order if key in waiting]
            if awaited:
                wanted = [key for key in wanted if key not in awaited]
            if wanted:
                caches = stacks.by_slice[0]
                self._begin(plan, 0, plan.keys, [Fetch(key, self._look_up(key, caches)) for key in wanted])
            return
        for slice_ in range(len(stacks.sizes)):
            # Each slice is fetched, admitted and evicted as if it were alone.
            users = [k for k in plan.keys if plan.uses(k) and slice_ in stacks.precisions[plan.precision(k)]]
            fetches = self._wanted(plan, slice_, users, order)
            if fetches:
                self._begin(plan, slice_, users, fetches)
        if stacks.nested:
            self._together(plan, order)

    def _wanted(
        self, plan: LayerPlan, slice_: int, users: Sequence[ExpertKey], order: Sequence[ExpertKey]
    ) -> list[Fetch]:
        """A fetch for each of the slice's users that lacks it where it is computed, and that nobody brings yet."""
        caches = self._stacks.by_slice[slice_]
        begun: dict[ExpertKey, Fetch] = {}
        for key in users:
            here, waits = key not in plan.on_cpu, slice_ in plan.waiting.get(key, ())
            missing = (waits or not here) and caches[0].state(key) is State.MISS
            if not missing and (here or not waits):
                continue
            source = self._look_up(key, caches)
            if here or source is Tier.DISK:
                begun[key] = Fetch(key, source, slice=slice_, to_host=not here)
        return [begun[key] for key in order if key in begun]

    def _begin(self, plan: LayerPlan, slice_: int, users: Sequence[ExpertKey], fetches: list[Fetch]) -> None:
        """Add `fetches` of a slice to the plan, and ask each tier that they pass which of them it keeps."""
        caches = self._stacks.by_slice[slice_]
        before, members, passing = plan.fetches, users, len(fetches)
        plan.fetches = [*before, *fetches]
        if plan.on_cpu:
            members = [key for key in users if key not in plan.on_cpu]
            passing = sum(not fetch.to_host for fetch in fetches)
        if passing:
            late = self._admit(fetches, caches[0], members, passing, slice_)
            if late:
                early = [fetch for fetch in fetches if fetch not in late]
                plan.fetches = [*before, *early]
                plan.late_fetches += late
                fetches = [*early, *late]
        if len(caches) == 1:
            return
        sources = {fetch.key: fetch.source for fetch in fetches}
        for cache in caches[1:]:
            # What a slower tier is asked for is copied from there, and stays.
            read = [key for key in users if key in sources and sources[key] is not cache.tier]
            if read:
                cache.use([*(key for key in users if key in sources and key not in read), *plan.on_cpu])
                self._admit(fetches, cache, read, len(read), slice_)

    def _admit(
        self, fetches: list[Fetch], cache: ExpertCache, members: Sequence[ExpertKey], passing: int, slice_: int
    ) -> list[Fetch]:
        """Ask `cache` which of `members` it keeps, of whom so many pass it, and note in `fetches` what that takes.
        Gives those that have to wait for a member's place."""
        admission = cache.admit(members, self._stacks.sizes[slice_])
        self._stats[cache.tier].bypasses += passing - len(admission.admitted)
        if not admission.admitted:
            return []
        kept = fetches
        if len(admission.admitted) < len(kept):
            kept = [fetch for fetch in kept if fetch.key in admission.admitted]
        for fetch in kept:
            fetch.admitted += (cache.tier,)
        if admission.evicted:
            self._evicted(cache.tier, slice_, admission.evicted)
            kept[0].evicted[cache.tier] = admission.evicted
        if not admission.surrendered:
            return []
        self._evicted(cache.tier, slice_, admission.surrendered)
        late = kept[-len(admission.surrendered) :]
        late[0].evicted.setdefault(cache.tier, []).extend(admission.surrendered)
        return late

    def _look_up(self, key: ExpertKey, caches: Sequence[ExpertCache]) -> Tier:
        """The nearest tier behind the computing one that has the bytes, counted there."""
        for cache in caches[1:]:
            stats = self._stats[cache.tier]
            if cache.state(key) is State.RESIDENT:
                stats.hits += 1
                return cache.tier
            stats.misses += 1
        return Tier.DISK

    def _together(self, plan: LayerPlan, order: Sequence[ExpertKey]) -> None:
        """All slices of an expert one after the other: then those that are staged cannot wait for each other.

        Where base slices come first, the others of experts that are not staged follow behind all of them.
        """
        if plan.late_fetches:
            plan.late_fetches = [*(fetch for fetch in plan.fetches if not fetch.to_host), *plan.late_fetches]
            plan.fetches = [fetch for fetch in plan.fetches if fetch.to_host]
        rank = {key: index for index, key in enumerate(order)}
        staged = {f.key for f in (*plan.fetches, *plan.late_fetches) if self._stacks.computing not in f.admitted}

        def place(fetch: Fetch) -> tuple[bool, int]:
            last = self._base is not None and fetch.slice not in self._base and fetch.key not in staged
            return last, rank[fetch.key]

        for fetches in (plan.fetches, plan.late_fetches):
            fetches.sort(key=place)
            # Some of a slice have changed places: all its evictions come first.
            first: dict[int, Fetch] = {}
            for fetch in fetches:
                leader = first.setdefault(fetch.slice, fetch)
                if leader is not fetch:
                    for tier, victims in fetch.evicted.items():
                        leader.evicted.setdefault(tier, []).extend(victims)
                    fetch.evicted = {}


def urgency(plan: LayerPlan, hotness: Callable[[ExpertKey], float] | None = None) -> list[ExpertKey]:
    """The members in the order in which to fetch them: those of most tokens first, then the hottest, if somebody knows
    them, then those of the highest weight."""
    event = plan.event
    keys = plan.keys[::-1]
    if hotness is not None:
        keys.sort(key=hotness, reverse=True)  # stable
    if sum(event.tokens) > len(event.experts):
        tokens = dict(zip(event.experts, event.tokens, strict=True))
        keys.sort(key=lambda key: -tokens[key.expert])  # stable: the highest weight comes first of equals
    return keys
