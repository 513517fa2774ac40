"""The decision loop where experts have several precisions: a fallback says which one serves a miss. Torch-free.

Every slice has caches of its own. An event first asks what each member should be computed at; what of that is not
there is the fallback's to decide; and then each slice is fetched, admitted and evicted as if it were alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

from cache.errors import PolicyError
from cache.residency import ExpertCache, State
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.fallbacks.base import SKIP, Candidate, Choice, Fallback
from offload.decide.log import Decision
from offload.decide.manager import Manager
from offload.decide.pace import Pace, PassTime
from offload.decide.plan import Fetch, LayerPlan, MixedPlan
from offload.decide.prefetch import Prefetcher, nearest


class MixedManager(Manager):
    """A manager of several slices. `precisions` lists the slices that each precision takes, the best precision first.

    `stacks` are the caches of every slice, from the tier that computes to the slowest, `sizes` what a slice takes.
    Super experts are always computed at their target and, once they are where they compute, never evicted.
    """

    def __init__(
        self,
        stacks: Sequence[Sequence[ExpertCache]],
        sizes: Sequence[int],
        precisions: Sequence[Sequence[int]],
        fallback: Fallback,
        prefetcher: Prefetcher | None = None,
        super_experts: Collection[ExpertKey] = (),
    ) -> None:
        super().__init__(stacks[0], sizes[0], prefetcher)
        self.stacks = [list(caches) for caches in stacks]
        self.caches = self.stacks[0]
        self.sizes = list(sizes)
        self.precisions = [tuple(slices) for slices in precisions]
        self.fallback = fallback
        self.uses = [0] * len(precisions)
        """Expert uses at each precision, since the start or `reset_stats`."""
        self.skipped = 0
        """Experts that a fallback left out."""
        self.replaced = 0
        """Expert uses that went to another expert than the router's choice; not counted in `uses`."""
        self._super = frozenset(super_experts)
        self._pace = Pace()
        self._held: list[tuple[ExpertCache, ExpertKey]] = []  # pinned for this event
        self._behind: dict[tuple[ExpertKey, int], Fetch] = {}  # fetches of targets that nobody waits for

    def step(self, event: RoutingEvent) -> MixedPlan:
        """As `Manager.step`, each member at the precision that the fallback chooses."""
        plan = MixedPlan(event, [])
        keys = event.keys
        try:
            for cache in self._all():
                cache.policy.on_event(event)
            missing = self._serve(plan, event, keys)
            if self.prefetcher is not None:
                first = [key for key in keys if plan.uses(key) and 0 in self.precisions[plan.precision(key)]]
                self._predict(self.prefetcher, event, first, missing[0])
            for slice_, wanted in enumerate(missing):
                if wanted:
                    self._fetch_slice(plan, keys, wanted, slice_)
            self._in_order(plan)
            self._protect(plan, keys)
            self._fetch_behind(plan)
            if self.prefetcher is not None:
                self._plan_prefetches(self.prefetcher, plan)
        except Exception as error:  # a user's own policy, predictor or fallback may raise anything
            plan.error = error
        self._protect(plan, keys)
        if self.log is not None:
            self.log.append(Decision.of(plan))
        return plan

    def finish(self) -> None:
        """The event is over: what it used may be evicted again, super experts excepted."""
        for cache, key in self._held:
            cache.unpin(key)
        self._held.clear()
        super().finish()

    def passed(self, time: PassTime) -> None:
        """A forward pass is over, and this is where its time went."""
        self._pace.update(time)
        super().passed(time)
        if self.log:
            self.log[-1].passed = time

    def reset_stats(self) -> None:
        """Count from zero."""
        super().reset_stats()
        self.uses = [0] * len(self.precisions)
        self.skipped = self.replaced = 0

    def resident_experts(self, layer: int) -> list[int]:
        """Those of a layer that are resident at the best precision where they compute."""
        here = [key for key in self.stacks[self.precisions[0][0]][0].resident() if key.layer == layer]
        return [key.expert for key in here if self._state(key, 0) is State.RESIDENT]

    def rerouted(self, count: int) -> None:
        """So many experts of the event to come are there because they are resident, not by the router's choice."""
        self.replaced += count
        self.uses[0] -= count

    def check_integrity(self) -> None:
        """As `Manager.check_integrity`."""
        for cache in self._all():
            cache.check_integrity(idle=not self._super and not self._behind)

    def _serve(self, plan: MixedPlan, event: RoutingEvent, keys: Sequence[ExpertKey]) -> list[list[ExpertKey]]:
        """Decide the precision of every member; what each slice misses for that, in touch order."""
        stats = self.stats[self.computing.tier]
        targets = [0 if key in self._super else self.fallback.target(key) for key in keys]
        states = [self._state(key, target) for key, target in zip(keys, targets, strict=True)]
        chosen = [Choice(target) for target in targets]
        asked: list[int] = []
        for index, state in enumerate(states):
            stats.hits += state is State.RESIDENT
            stats.late_hits += state is State.PENDING
            stats.misses += state is State.MISS
            if state is not State.RESIDENT and keys[index] not in self._super:
                asked.append(index)
        if asked:
            total = sum(event.weights) or 1.0
            after = [0.0, *accumulate(event.weights[::-1])][::-1]  # weight of this and all stronger members
            stand_ins = self._stand_ins(keys, [(keys[i], targets[i]) for i in asked])
            candidates = [
                Candidate(
                    keys[i],
                    event.weights[i] / total,
                    after[i + 1] / total,
                    targets[i],
                    self._best_held(keys[i], targets[i]),
                    tuple(self._fetch_s(keys[i], precision) for precision in range(len(self.precisions))),
                    stand_ins.get(keys[i]),
                )
                for i in asked
            ]
            there = len(keys) - len(asked)
            spare_s = there * self._pace.expert_s.get(event.phase, 0.0)
            choices = self.fallback.choose(event, candidates, spare_s)
            self._check(choices, len(asked))
            for i, choice in zip(asked, choices, strict=True):
                chosen[i] = choice
        missing: list[list[ExpertKey]] = [[] for _ in self.stacks]
        for key, target, choice in zip(keys, targets, chosen, strict=True):
            self._take(plan, key, target, choice, missing)
        return missing

    def _stand_ins(
        self, keys: Sequence[ExpertKey], asked: Sequence[tuple[ExpertKey, int]]
    ) -> dict[ExpertKey, ExpertKey]:
        """A resident expert for each that is missing, where the fallback knows one; the heaviest chooses first."""
        taken = set(keys)
        found: dict[ExpertKey, ExpertKey] = {}
        for key, target in reversed(asked):
            for other in self.fallback.stand_ins(key):
                if other not in taken and self._state(other, target) is State.RESIDENT:
                    found[key] = other
                    taken.add(other)
                    break
        return found

    def _check(self, choices: Sequence[Choice], asked: int) -> None:
        """Raises PolicyError for what no fallback may say."""
        wrong = [c.precision for c in choices if not (c.precision == SKIP or 0 <= c.precision < len(self.precisions))]
        if wrong or len(choices) != asked:
            what = f"precision {wrong[0]}" if wrong else f"{len(choices)} times"
            raise PolicyError(
                f"fallback {type(self.fallback).__name__} chose {what} for {asked} experts: one choice for each, "
                f"SKIP or a precision from 0 to {len(self.precisions) - 1}"
            )

    def _take(
        self, plan: MixedPlan, key: ExpertKey, target: int, choice: Choice, missing: list[list[ExpertKey]]
    ) -> None:
        """Note one member's precision, and what it still takes."""
        if choice.precision == SKIP:
            plan.skipped.append(key)
            self.skipped += 1
            return
        if choice.precision:
            plan.precisions[key] = choice.precision
        if choice.instead is not None:
            self.replaced += 1
            plan.replaced[key] = choice.instead
            plan.resident.append(key)
            for slice_ in self.precisions[choice.precision]:
                self._hold(choice.instead, slice_)
            if choice.later:
                plan.later.append((key, target))
            return
        self.uses[choice.precision] += 1
        waits = []
        for slice_ in self.precisions[choice.precision]:
            state = self.stacks[slice_][0].state(key)
            if state is State.RESIDENT:
                continue
            waits.append(slice_)
            if state is State.MISS:
                missing[slice_].append(key)
            elif key not in plan.awaited:
                plan.awaited.append(key)
        if not waits:
            plan.resident.append(key)
        else:
            plan.waiting[key] = waits
            for slice_ in self.precisions[choice.precision]:
                if slice_ not in waits:  # its other slices must not be given up for somebody else's before it has run
                    self._hold(key, slice_)
        if choice.later and choice.precision != target:
            plan.later.append((key, target))

    def _hold(self, key: ExpertKey, slice_: int) -> None:
        """Nothing evicts it until the event is over."""
        cache = self.stacks[slice_][0]
        cache.pin(key)
        self._held.append((cache, key))

    def _fetch_slice(self, plan: MixedPlan, keys: Sequence[ExpertKey], missing: list[ExpertKey], slice_: int) -> None:
        users = [key for key in keys if plan.uses(key) and slice_ in self.precisions[plan.precision(key)]]
        part = LayerPlan(plan.event, [])
        try:
            self._plan_fetches(part, users, missing, slice_)
        finally:  # what was planned until an error is carried out
            plan.fetches += part.fetches
            plan.late_fetches += part.late_fetches

    def _in_order(self, plan: MixedPlan) -> None:
        """All slices of an expert together: then those that are staged cannot wait for each other."""
        if max(len(slices) for slices in self.precisions) == 1:
            return
        if plan.late_fetches:
            plan.late_fetches = [*plan.fetches, *plan.late_fetches]
            plan.fetches = []
        members = sorted(
            zip(plan.event.keys[::-1], plan.event.tokens[::-1], strict=True), key=lambda member: -member[1]
        )
        rank = {key: index for index, (key, _) in enumerate(members)}
        plan.fetches.sort(key=lambda fetch: rank[fetch.key])
        plan.late_fetches.sort(key=lambda fetch: rank[fetch.key])
        # Those of a slice that were late already have changed places with the others: all evictions come first.
        first: dict[int, Fetch] = {}
        for fetch in plan.late_fetches:
            leader = first.setdefault(fetch.slice, fetch)
            if leader is not fetch:
                for tier, victims in fetch.evicted.items():
                    leader.evicted.setdefault(tier, []).extend(victims)
                fetch.evicted = {}

    def _fetch_behind(self, plan: MixedPlan) -> None:
        """Fetch the target of what is served below it, behind everything else, where there is room for it."""
        for key, target in plan.later:
            for slice_ in self.precisions[target]:
                caches = self.stacks[slice_]
                if caches[0].state(key) is State.MISS and len(self._behind) < len(plan.event.experts):
                    self._reserve_behind(plan, key, slice_)

    def _reserve_behind(self, plan: MixedPlan, key: ExpertKey, slice_: int) -> None:
        caches, nbytes = self.stacks[slice_], self.sizes[slice_]
        if any(fetch.key == key and fetch.slice == slice_ for fetch in (*plan.fetches, *plan.late_fetches)):
            return
        for fetch in plan.late_fetches:
            if fetch.slice == slice_ and any(key in victims for victims in fetch.evicted.values()):
                return  # it keeps its slot until they start, which is later
        above = []
        source = Tier.DISK
        for cache in caches:
            state = cache.state(key)
            if state is State.RESIDENT:
                source = cache.tier
                break
            if state is State.PENDING or cache.victims(key, nbytes) is None:
                return
            above.append(cache)
        fetch = Fetch(key, source, tuple(cache.tier for cache in above), slice=slice_)
        for cache in above:
            evicted = cache.reserve(key, nbytes)
            if evicted:
                fetch.evicted[cache.tier] = evicted
                self._count_evicted(cache.tier, evicted, slice_)
        if source is not Tier.DISK:
            next(cache for cache in caches if cache.tier is source).pin(key)
        self._behind[key, slice_] = fetch
        plan.prefetches.append(fetch)

    def _protect(self, plan: MixedPlan, keys: Sequence[ExpertKey]) -> None:
        for slice_, caches in enumerate(self.stacks):
            using = [key for key in keys if plan.uses(key) and slice_ in self.precisions[plan.precision(key)]]
            for cache in caches:
                cache.use(using)

    def _ended(self, fetch: Fetch) -> bool:
        if self._behind.get((fetch.key, fetch.slice)) is fetch:
            del self._behind[fetch.key, fetch.slice]
            for cache in self.stacks[fetch.slice]:
                if cache.tier is fetch.source:
                    cache.unpin(fetch.key)
        elif fetch.slice == 0 and super()._ended(fetch):
            return True
        return False

    def arrived(self, fetch: Fetch, bytes_from_disk: int) -> None:
        """As `Manager.arrived`; a super expert stays from now on."""
        super().arrived(fetch, bytes_from_disk)
        if fetch.key in self._super and self.computing.tier in fetch.admitted:
            self.stacks[fetch.slice][0].pin(fetch.key)

    def _state(self, key: ExpertKey, precision: int) -> State:
        states = {self.stacks[slice_][0].state(key) for slice_ in self.precisions[precision]}
        return next(state for state in (State.MISS, State.PENDING, State.RESIDENT) if state in states)

    def _best_held(self, key: ExpertKey, target: int) -> int | None:
        precisions = range(target, len(self.precisions))
        return next((p for p in precisions if self._state(key, p) is State.RESIDENT), None)

    def _fetch_s(self, key: ExpertKey, precision: int) -> float:
        """What is missing for a precision, on the channels that bring it; averages are of the first slice."""
        seconds = 0.0
        for slice_ in self.precisions[precision]:
            caches = self.stacks[slice_]
            if caches[0].state(key) is State.RESIDENT:
                continue
            source = nearest(key, caches[1:])
            seconds += self._pace.fetch_s.get(source, 0.0) * self.sizes[slice_] / self.sizes[0]
        return seconds
