"""What the decision loop decided, event by event.

The heart of the architecture as an object: a log taken live, replayed against fresh caches with the completions that
were recorded, must come out identical.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cache.types import ExpertKey, RoutingEvent, Tier

if TYPE_CHECKING:
    from offload.decide.pace import PassTime
    from offload.decide.plan import Fetch, LayerPlan


@dataclass(frozen=True, slots=True)
class FetchDecision:
    """One planned fetch: from where, kept by which tiers, and what gives its place up before it."""

    key: ExpertKey
    source: Tier
    admitted: tuple[Tier, ...]
    evicted: tuple[tuple[Tier, tuple[ExpertKey, ...]], ...]
    late: bool
    slice: int = 0
    to_host: bool = False

    @classmethod
    def of(cls, fetch: Fetch, *, late: bool) -> FetchDecision:
        """A copy of what `fetch` says now."""
        evicted = tuple((tier, tuple(keys)) for tier, keys in fetch.evicted.items())
        return cls(fetch.key, fetch.source, fetch.admitted, evicted, late, fetch.slice, fetch.to_host)


@dataclass(slots=True)
class Decision:
    """One event, what was planned for it, and how fetches ended until the next, in order: (expert, slice, arrived).

    `passed` is what was said of the time of the pass that ended with this event.
    """

    event: RoutingEvent
    resident: tuple[ExpertKey, ...]
    fetches: tuple[FetchDecision, ...]
    awaited: tuple[ExpertKey, ...] = ()
    prefetches: tuple[FetchDecision, ...] = ()
    cancelled: tuple[ExpertKey, ...] = ()
    below_best: tuple[tuple[ExpertKey, int], ...] = ()
    stand_ins: tuple[tuple[ExpertKey, ExpertKey], ...] = ()
    on_cpu: tuple[ExpertKey, ...] = ()
    dropped: tuple[tuple[Tier, int, tuple[ExpertKey, ...]], ...] = ()
    completions: list[tuple[ExpertKey, int, bool]] = field(default_factory=list)
    passed: PassTime | None = None

    @classmethod
    def of(cls, plan: LayerPlan) -> Decision:
        """What `plan` says; nothing is completed yet."""
        fetches = [FetchDecision.of(fetch, late=False) for fetch in plan.fetches]
        late = [FetchDecision.of(fetch, late=True) for fetch in plan.late_fetches]
        return cls(
            plan.event,
            tuple(plan.resident),
            (*fetches, *late),
            tuple(plan.awaited),
            tuple(FetchDecision.of(fetch, late=False) for fetch in plan.prefetches),
            tuple(fetch.key for fetch in plan.cancelled),
            plan.below_best(),
            plan.stand_ins(),
            tuple(plan.on_cpu),
            tuple((each.tier, each.slice, tuple(each.keys)) for each in plan.dropped),
        )
