"""What the decision loop hands out: how each member of one layer's event is served, and the fetches that this takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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


class Dropped(NamedTuple):
    """Experts that a tier's cache of a slice gave up for nobody's sake: their layer has fewer places now."""

    tier: Tier
    slice: int
    keys: Sequence[ExpertKey]


class LayerPlan:
    """What one event needs: experts resident where they compute, and fetches for the others, the most urgent first.

    A new plan is empty. It is made for every layer of every token, so its fields are written out here: a dataclass
    takes half as long again.
    """

    __slots__ = (
        "awaited",
        "cancelled",
        "dropped",
        "error",
        "event",
        "fetches",
        "keys",
        "late_fetches",
        "later",
        "on_cpu",
        "precisions",
        "prefetches",
        "replaced",
        "resident",
        "skipped",
        "targets",
        "waiting",
    )

    def __init__(self, event: RoutingEvent) -> None:
        self.event = event
        self.keys: list[ExpertKey] = event.keys
        """The event's members, in ascending weight."""
        self.dropped: Sequence[Dropped] = ()
        """What gives its place up before anything else."""
        self.resident: list[ExpertKey] = []
        self.waiting: dict[ExpertKey, Sequence[int]] = {}
        """The slices that a member waits for."""
        self.fetches: list[Fetch] = []
        self.late_fetches: list[Fetch] = []
        """They take places that resident members of this very event give up: they start when all of `resident` has
        been used."""
        self.awaited: list[ExpertKey] = []
        """Members of which slices are on their way already: from now on these are as urgent as `fetches`."""
        self.on_cpu: list[ExpertKey] = []
        """The members that the CPU computes beside the accelerator, in this order: what is not fetched `to_host` for
        them lies in host memory."""

        self.precisions: dict[ExpertKey, int] = {}
        """The members that are served at another precision than the best."""
        self.skipped: list[ExpertKey] = []
        """The members that are left out."""
        self.replaced: dict[ExpertKey, ExpertKey] = {}
        """The members in whose place another expert is computed, which is resident."""
        self.targets: dict[ExpertKey, int] = {}
        """The precision that each of these three kinds should have."""

        self.cancelled: list[Fetch] = []
        """Earlier prefetches, to be taken back if they have not begun."""
        self.prefetches: list[Fetch] = []
        """New ones, to be started behind everything else."""
        self.later: list[ExpertKey] = []
        """The members whose target is worth a prefetch."""

        self.error: Exception | None = None
        """What a policy, a predictor, a fallback or a scheduler raised while the plan was made. The fetches begun until
        then hold reservations, so they are carried out all the same; then it is raised."""

    def in_place(self) -> list[ExpertKey]:
        """Those of `on_cpu` that are in host memory."""
        return [key for key in self.on_cpu if key not in self.waiting]

    def precision(self, key: ExpertKey) -> int:
        """At which of the store's precisions a member is computed."""
        return self.precisions.get(key, 0)

    def computed_as(self, key: ExpertKey) -> ExpertKey:
        """The expert whose weights serve a member: its own, unless a fallback has replaced it."""
        return self.replaced.get(key, key)

    def uses(self, key: ExpertKey) -> bool:
        """Whether a member's own weights are computed with."""
        return key not in self.replaced and key not in self.skipped

    def below_best(self) -> tuple[tuple[ExpertKey, int], ...]:
        """The members that are computed at another precision than the first, and which; -1: not at all."""
        return (*self.precisions.items(), *((key, -1) for key in self.skipped))

    def stand_ins(self) -> tuple[tuple[ExpertKey, ExpertKey], ...]:
        """The members that are replaced, each with the expert that is computed in its place."""
        return tuple(self.replaced.items())
