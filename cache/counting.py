"""Counting replay: which accesses would have hit, for many caches at once. Equal sizes, on demand only, no clock.

Every sequence, layer and capacity is a lane, and all lanes take their step at the same time: one call of the policy's
`touch` and `priorities` serves them all. The rules are those of `ExpertCache.admit`, so that hits, misses and victims are
those of the live decision loop: an event's members are looked up against the state before it; after it a lane holds
the best of what it held and the members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.lanes import Ints, Lanes, Touch
from cache.policy import EvictionPolicy, find_policy, make_policy
from cache.schedule import Chunk, Schedule
from cache.selection import weakest
from cache.trace import Trace

Observer = Callable[[Chunk, Touch, int, NDArray[np.bool_], list[tuple[Ints, Ints]]], None]
"""Told of every event: where, which capacity, which members were there, and (lanes, columns) that went, round by round."""


@dataclass(slots=True)
class Count:
    """What happened in one replay at one capacity."""

    slots: tuple[int, ...]
    """Experts that fit, of each lane of the model: a layer's, or all layers'."""
    accesses: int = 0
    hits: int = 0
    evictions: int = 0
    bypasses: int = 0
    """Misses whose expert was not kept."""

    @property
    def misses(self) -> int:
        """Accesses to an expert that was not there before the event; first touches are misses."""
        return self.accesses - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits / accesses; 0.0 before the first access."""
        return self.hits / self.accesses if self.accesses else 0.0


def count(
    trace: Trace,
    policy: str,
    capacities: Sequence[Sequence[int]],
    *,
    pool: str = "layer",
    cold: bool = True,
    profile: Trace | None = None,
    observer: Observer | None = None,
) -> list[Count]:
    """Replay `trace` under `policy` at each of `capacities`: experts that fit, one number a layer, or one for all layers.

    `pool` is "layer" (a cache for each layer) or "global" (one for all); `cold` empties caches, counters and policy
    at every sequence, else they are kept from one to the next, starting empty. Raises PolicyError for a policy that
    cannot be made, and TraceError for a damaged trace.
    """
    schedule = Schedule(trace, pool=pool, cold=cold)
    counts = [Count(tuple(slots)) for slots in capacities]
    cls = find_policy(policy)
    # A rule that never looks at the cache has one state for all capacities.
    groups = [[c] for c in counts] if cls.sees_cache else [counts]
    for group in groups:
        for chunk in schedule.chunks():
            slots = np.array([np.tile(c.slots, chunk.units) for c in group], np.int64)
            lanes = Lanes(trace.num_layers, schedule.layers_per_lane, trace.num_experts, slots[0])
            made = make_policy(policy, lanes, profile)
            if not made.causal:
                made.foresee(chunk)
            _Replay(made, slots, group, observer).run(chunk)
    return counts


class _Replay:
    """The caches of one chunk's lanes at several capacities, under one policy."""

    def __init__(self, policy: EvictionPolicy, slots: Ints, counts: list[Count], observer: Observer | None) -> None:
        self.policy = policy
        self.slots = slots  # [capacities, lanes]
        self.counts = counts
        self.observer = observer
        self.resident = np.zeros((len(counts), policy.lanes.count, policy.lanes.width), np.bool_)
        self.held = np.zeros_like(slots)
        self._own = type(policy) if policy.sees_cache else None

    def run(self, chunk: Chunk) -> None:
        """Every event of the chunk, in order."""
        for touch, members in chunk.touches():
            self._event(chunk, touch, members)

    def _event(self, chunk: Chunk, touch: Touch, members: Ints | None) -> None:
        """`members` [N] is how many experts each lane's event has, where that is not K for all."""
        policy, lanes, at = self.policy, touch.lanes, touch.at
        num_caps, (num_lanes, top) = len(self.counts), at.shape
        flat = self.resident.reshape(num_caps, -1)
        was = flat[:, at]  # [C, N, K]
        sizes = np.full(num_lanes, top) if members is None else members
        real = None if members is None else np.arange(top) >= top - sizes[:, None]
        if real is not None:
            was &= real
        hits = was.sum(axis=2)
        policy.touch(touch)

        held, slots = self.held[:, lanes], self.slots[:, lanes]
        missing = sizes - hits
        excess = held + missing - slots
        rounds: list[tuple[Ints, Ints]] = []
        resident = self.resident[:, lanes]  # a view: lanes is a slice
        before = resident.copy() if policy.bypass and excess.max() > 0 else None
        kept = at
        del kept
        if excess.max() > 0:
            rounds = self._give_up(touch, resident, np.maximum(excess, 0), slots, sizes, real)
        self._settle(touch, flat, was, real, excess, rounds, before)
        np.minimum(held + missing, slots, out=self.held[:, lanes])
        for index, total in enumerate(self.counts):
            total.accesses += int(sizes.sum())
            total.hits += int(hits[index].sum())
