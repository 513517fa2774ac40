"""How layers that have a cache each share every tier's capacity, and when that changes. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from cache.errors import PolicyError
from cache.quota import Quota
from cache.residency import ExpertCache
from cache.types import Phase, RoutingEvent
from offload.decide.fetching import Evicted
from offload.decide.plan import Dropped, LayerPlan
from offload.decide.stacks import Stacks


def nothing_to_share(quota: str) -> PolicyError:
    """Why a quota cannot run where all layers have one cache."""
    return PolicyError(
        f"--quota {quota} divides the cache among layers, and with --pool global all have one: leave one of them out"
    )


class Sharing:
    """Divides every cache of `stacks` as `quota` says: before the first event, and again before each prompt or each
    pass, if the quota changes with what a model uses.

    The lanes of all caches are layers. Every cache is divided by itself, since it has a capacity of its own. `evicted`
    is told of every eviction.
    """

    def __init__(self, quota: Quota, stacks: Stacks, evicted: Evicted) -> None:
        self.quota = quota
        self._stacks = stacks
        self._evicted = evicted
        self._pass: tuple[int, int] | None = None
        self._phase = Phase.DECODE
        self._asks = True  # whether the quota is to be asked
        self._due: list[tuple[int, ExpertCache, Sequence[int]]] = []  # slices, caches, and slots that they do not have

    def observe(self, plan: LayerPlan) -> None:
        """An event has come. If it is time, divide anew, and add to `plan` what has to go for that.

        What the event needs stays, as does what is pinned or on its way. A cache in which too much of that is in the
        way is divided with a later event.
        """
        event, quota = plan.event, self.quota
        if quota.adapts:
            self._asks |= self._begins(event)
        self._ask()
        if self._due:
            self._due = [each for each in self._due if not self._divide(plan, *each)]
        if quota.adapts:
            quota.observe(event)

    def begin(self) -> None:
        """Divide what is empty already, before the first event: something is about to be placed there."""
        self._ask()
        empty = [each for each in self._due if not any(each[1].used)]
        for slice_, cache, slots in empty:
            cache.resize(slots, self._stacks.sizes[slice_])
        self._due = [each for each in self._due if each not in empty]

    def reset(self) -> None:
        """Forget what was observed, as a cold start does; every cache is divided anew."""
        self.quota.reset()
        self._pass, self._phase = None, Phase.DECODE
        self._asks = True

    def _begins(self, event: RoutingEvent) -> bool:
        """Whether the quota is to be asked before this event: it begins a pass, or a prompt."""
        now = event.sequence, event.step
        before, self._pass = self._pass, now
        if before is None or before == now:
            return False
        prompt = before[0] != now[0] or (event.phase is Phase.PREFILL and self._phase is Phase.DECODE)
        self._phase = event.phase
        return prompt or self.quota.every_pass

    def _ask(self) -> None:
        """Ask the quota, if it is time."""
        if self._asks:
            sizes = self._stacks.sizes
            self._due = [
                (slice_, cache, self.quota.slots(cache.capacity_bytes // sizes[slice_]))
                for slice_, caches in enumerate(self._stacks.by_slice)
                for cache in caches
            ]
            self._asks = False

    def _divide(self, plan: LayerPlan, slice_: int, cache: ExpertCache, slots: Sequence[int]) -> bool:
        """Give a cache's lanes so many slots; says whether that could be."""
        gone = cache.resize(slots, self._stacks.sizes[slice_], plan.keys)
        if gone:
            plan.dropped = (*plan.dropped, Dropped(cache.tier, slice_, gone))
            self._evicted(cache.tier, slice_, gone)
        return gone is not None
