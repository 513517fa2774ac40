"""What fetching one expert ahead takes: the slices that the computing tier misses, where each comes from, and what goes
for it on the way. All of it or none. Torch-free, part of the decision loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Tier
from offload.decide.plan import Fetch
from offload.decide.stacks import Stacks

SliceKey = tuple[ExpertKey, int]
"""One slice of an expert."""


@dataclass(slots=True)
class _Part:
    """A slice to bring: from where, through which caches, and what goes for it in each."""

    slice: int
    source: Tier
    caches: list[ExpertCache]
    victims: list[list[ExpertKey]]


class Parcel:
    """The slices of `key` at a precision that the computing tier misses; there is at least one."""

    def __init__(self, key: ExpertKey, precision: int, stacks: Stacks) -> None:
        self.key = key
        self._stacks = stacks
        self._protected: Collection[ExpertKey] = ()
        self._parts = [
            _Part(slice_, source, stacks.on_the_way(key, slice_, source), [])
            for slice_ in stacks.precisions[precision]
            if stacks.by_slice[slice_][0].state(key) is State.MISS
            for source in (stacks.source(key, slice_),)
        ]

    @property
    def sources(self) -> set[Tier]:
        """Where its slices come from."""
        return {part.source for part in self._parts}

    def load(self) -> dict[Tier, float]:
        """By source, what has to come from there, in first slices."""
        found: dict[Tier, float] = {}
        for part in self._parts:
            found[part.source] = found.get(part.source, 0.0) + self._stacks.weight(part.slice)
        return found

    def times(self, fetch_s: Mapping[Tier, float], unknown_s: float) -> dict[Tier, float]:
        """By source, how long its channel is busy with it; `fetch_s` are the times of a first slice."""
        return {source: fetch_s.get(source, unknown_s) * slices for source, slices in self.load().items()}

    def find_room(self, protected: Collection[ExpertKey]) -> bool:
        """Find what has to go in every cache on the way, sparing what is `protected`. False: there is no room."""
        self._protected = protected
        for part in self._parts:
            for cache in part.caches:
                victims = cache.victims(self.key, self._stacks.sizes[part.slice], protected)
                if victims is None:
                    return False
                part.victims.append(victims)
        return True

    def victims(self) -> list[SliceKey]:
        """What goes in the computing tier."""
        return [(victim, part.slice) for part in self._parts for victim in part.victims[0]]

    def costs_the_kept(self, passage: int) -> bool:
        """Whether what goes for it is worth keeping by rank, in caches of which so many places are passage."""
        return any(
            cache.among_highest(victim, self._stacks.sizes[part.slice], passage)
            for part in self._parts
            for cache, victims in zip(part.caches, part.victims, strict=True)
            for victim in victims
        )

    def reserve(self) -> Iterator[Fetch]:
        """Reserve its places, for which the victims found go, and keep its sources: the bytes are copied some time
        later."""
        for part in self._parts:
            fetch = Fetch(self.key, part.source, tuple(cache.tier for cache in part.caches), slice=part.slice)
            for cache, victims in zip(part.caches, part.victims, strict=True):
                if victims:
                    fetch.evicted[cache.tier] = list(victims)
                cache.reserve(self.key, self._stacks.sizes[part.slice], self._protected)
            if part.source is not Tier.DISK:
                self._stacks.cache(part.source, part.slice).pin(self.key)
            yield fetch
