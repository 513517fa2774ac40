"""What every tier holds of every expert. An expert is one or several slices; a precision takes one or several of them.

Every slice has a cache of its own in every tier. Plain experts are the common case: one precision, one slice.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Tier


class Stacks:
    """The caches of each slice, from the tier that computes to the slowest; the disk behind them holds everything.

    `sizes` are the slices' bytes in any tier, `precisions` the slices that each precision takes, the best precision
    first.
    """

    def __init__(
        self, stacks: Sequence[Sequence[ExpertCache]], sizes: Sequence[int], precisions: Sequence[Sequence[int]]
    ) -> None:
        self.by_slice = [list(caches) for caches in stacks]
        """By slice, then by tier."""
        self.sizes = list(sizes)
        self.precisions = [tuple(slices) for slices in precisions]
        self.caches = [cache for caches in self.by_slice for cache in caches]
        """All of them."""
        self.tiers = [cache.tier for cache in self.by_slice[0]]
        self.computing = self.tiers[0]
        """The tier that computes."""
        self.nested = any(len(slices) > 1 for slices in self.precisions)
        """Whether a precision takes several slices."""
        self.plain = self.precisions == [(0,)]
        """Whether an expert is one slice at one precision."""

    @classmethod
    def single(cls, caches: Sequence[ExpertCache], nbytes: int) -> Stacks:
        """Plain experts of so many bytes."""
        return cls([caches], [nbytes], [(0,)])

    def state(self, key: ExpertKey, precision: int) -> State:
        """Where an expert stands in the computing tier: as its furthest slice does."""
        if self.plain:
            return self.caches[0].state(key)
        found = State.RESIDENT
        for slice_ in self.precisions[precision]:
            state = self.by_slice[slice_][0].state(key)
            if state is State.MISS:
                return state
            if state is State.PENDING:
                found = state
        return found

    def lacking(self, key: ExpertKey, precision: int) -> list[int]:
        """The slices of a precision that the computing tier does not hold yet."""
        return [s for s in self.precisions[precision] if self.by_slice[s][0].state(key) is not State.RESIDENT]

    def lacking_on_host(self, key: ExpertKey, precision: int) -> list[int]:
        """The slices of a precision that the tier behind the computing one does not hold yet."""
        return [s for s in self.precisions[precision] if self.by_slice[s][1].state(key) is not State.RESIDENT]

    def best(self, key: ExpertKey, target: int) -> int | None:
        """The best precision, from `target` down, at which the computing tier holds an expert."""
        precisions = range(target, len(self.precisions))
        return next((p for p in precisions if self.state(key, p) is State.RESIDENT), None)

    def source(self, key: ExpertKey, slice_: int = 0) -> Tier:
        """The nearest slower tier that holds a slice; the disk holds all."""
        for cache in self.by_slice[slice_][1:]:
            if cache.state(key) is State.RESIDENT:
                return cache.tier
        return Tier.DISK

    def weight(self, slice_: int) -> float:
        """Bytes of a slice beside those of the first, in whose sizes transfers are timed."""
        return self.sizes[slice_] / self.sizes[0]

    def nbytes(self, precision: int) -> int:
        """What an expert takes at a precision."""
        return sum(self.sizes[slice_] for slice_ in self.precisions[precision])

    def cache(self, tier: Tier, slice_: int = 0) -> ExpertCache:
        """A tier's cache of a slice."""
        return self.by_slice[slice_][self.tiers.index(tier)]

    def on_the_way(self, key: ExpertKey, slice_: int, source: Tier) -> list[ExpertCache]:
        """The caches nearer than `source` that have no place for a slice."""
        found = []
        for cache in self.by_slice[slice_]:
            if cache.tier is source:
                break
            if cache.state(key) is State.MISS:
                found.append(cache)
        return found

    def resident(self, layer: int) -> list[int]:
        """The layer's experts that the computing tier holds at the best precision."""
        first = self.by_slice[self.precisions[0][0]][0]
        return [key.expert for key in first.resident() if key.layer == layer and self.state(key, 0) is State.RESIDENT]
