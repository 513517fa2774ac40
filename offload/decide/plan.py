"""What the decision loop hands out: the fetches that one layer's event makes necessary, or worth making."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cache.types import ExpertKey, RoutingEvent, Tier


@dataclass(slots=True, eq=False)
class Fetch:
    """One slice of an expert, on its way to the tier that computes, decided but not yet travelled.

    `slice` is its index in the store; `source` the nearest tier that holds the bytes; `admitted` the tiers whose caches
    keep them, each with a place reserved; `evicted` the experts whose places are given up before this fetch starts, for
    it and those after it. What is not admitted to the computing tier is streamed: it goes to a staging slot, is used
    once and forgotten. `to_host`: it ends in host memory, since the CPU computes it beside the accelerator.
    """

    key: ExpertKey
    source: Tier
    admitted: tuple[Tier, ...] = ()
    evicted: dict[Tier, list[ExpertKey]] = field(default_factory=dict)
    slice: int = 0
    to_host: bool = False


@dataclass(slots=True)
class LayerPlan:
    """What one event needs: experts resident where they compute, and fetches for the others, the most urgent first.

    `on_cpu` are the members that the CPU computes beside the accelerator, in this order: what is not fetched `to_host`
    for it lies in host memory. `late_fetches` take places that resident members of this very event give up: they start
    when all of `resident` has been used. `awaited` are members that are on their way already: from now on they are as
    urgent as `fetches`. Then what may wait: `cancelled` are earlier prefetches to take back if they have not begun,
    `prefetches` new ones, to be started behind everything else. `error` is what a policy or predictor raised while the
    plan was made. The fetches begun until then hold reservations, so they are carried out all the same; then it is
    raised.
    """

    event: RoutingEvent
    resident: list[ExpertKey]
    fetches: list[Fetch] = field(default_factory=list)
    late_fetches: list[Fetch] = field(default_factory=list)
    awaited: list[ExpertKey] = field(default_factory=list)
    cancelled: list[Fetch] = field(default_factory=list)
    prefetches: list[Fetch] = field(default_factory=list)
    error: Exception | None = None
    on_cpu: list[ExpertKey] = field(default_factory=list)

    def in_place(self) -> list[ExpertKey]:
        """Those of `on_cpu` that are in host memory."""
        fetched = {fetch.key for fetch in self.fetches if fetch.to_host}
        return [key for key in self.on_cpu if key not in fetched]

    def precision(self, key: ExpertKey) -> int:
        """At which of the store's precisions a member is computed."""
        return 0

    def waits_for(self, key: ExpertKey) -> Sequence[int]:
        """The slices that a member takes and that are not there yet, where it takes several."""
        return ()

    def below_best(self) -> tuple[tuple[ExpertKey, int], ...]:
        """The members that are computed at another precision than the first, and which; -1: not at all."""
        return ()

    def computed_as(self, key: ExpertKey) -> ExpertKey:
        """The expert whose weights serve a member: its own, unless a fallback has replaced it."""
        return key

    def stand_ins(self) -> tuple[tuple[ExpertKey, ExpertKey], ...]:
        """The members that are replaced, each with the expert that is computed in its place."""
        return ()


@dataclass(slots=True)
class MixedPlan(LayerPlan):
    """What one event needs where experts have several precisions, as a fallback decided.

    `precisions` of the members that are computed at another than the first; `skipped` members, which are not computed
    at all; those `replaced`, for which another expert that is resident is computed; the slices that each of the others
    is `waiting` for; and those whose better precision, named with them, is worth fetching `later`.
    """

    precisions: dict[ExpertKey, int] = field(default_factory=dict)
    skipped: list[ExpertKey] = field(default_factory=list)
    replaced: dict[ExpertKey, ExpertKey] = field(default_factory=dict)
    waiting: dict[ExpertKey, list[int]] = field(default_factory=dict)
    later: list[tuple[ExpertKey, int]] = field(default_factory=list)

    def precision(self, key: ExpertKey) -> int:
        """At which of the store's precisions a member is computed."""
        return self.precisions.get(key, 0)

    def waits_for(self, key: ExpertKey) -> Sequence[int]:
        """The slices that a member takes and that are not there yet."""
        return self.waiting.get(key, ())

    def below_best(self) -> tuple[tuple[ExpertKey, int], ...]:
        """The members that are computed at another precision than the first, and which; -1: not at all."""
        return (*self.precisions.items(), *((key, -1) for key in self.skipped))

    def computed_as(self, key: ExpertKey) -> ExpertKey:
        """The expert whose weights serve a member: its own, unless a fallback has replaced it."""
        return self.replaced.get(key, key)

    def stand_ins(self) -> tuple[tuple[ExpertKey, ExpertKey], ...]:
        """The members that are replaced, each with the expert that is computed in its place."""
        return tuple(self.replaced.items())

    def uses(self, key: ExpertKey) -> bool:
        """Whether a member's own weights are computed with."""
        return key not in self.skipped and key not in self.replaced
