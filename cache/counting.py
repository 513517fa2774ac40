"""Counting replay: which accesses would have hit, for many caches at once. Equal sizes, on demand only, no clock.

Every sequence, layer and capacity is a lane, and all lanes take their step at the same time: one call of the policy's
`touch` and `priorities` serves them all. The rules are those of `ExpertCache.admit`, so that hits, misses and victims are
those of the live decision loop: an event's members are looked up against the state before it; after it a lane holds
the best of what it held and the members.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache import passes
from cache.errors import PolicyError
from cache.lanes import Ints, Lanes, Touch
from cache.policy import EvictionPolicy, find_policy, make_policy
from cache.schedule import Schedule
from cache.selection import weakest
from cache.trace import Trace

Moves = list[tuple[Ints, Ints]]
"""Experts that went, or came, one a lane and round: (capacities, flat indices)."""

Observer = Callable[[Touch, Moves, Moves], None]
"""Told of every event: the touch, what went and what came, in order."""


class EventKind(NamedTuple):
    """All that the time of a layer's event depends on, while fetches are made on demand and go one after the other."""

    decode: bool
    tokens: int
    """Tokens routed, each to K experts."""
    hits: int
    misses: int


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
    events: Counter[EventKind] = field(default_factory=Counter)
    """How many events of each kind there were; filled only if `count` is asked to."""

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
    one_by_one: bool = False,
    profile: Trace | None = None,
    kinds: bool = False,
    observer: Observer | None = None,
) -> list[Count]:
    """Replay `trace` under `policy` at each of `capacities`: experts that fit, one number a layer, or one for all layers.

    `pool` is "layer" (a cache for each layer) or "global" (one for all); `cold` empties caches, counters and policy
    at every sequence, else they are kept from one to the next, starting empty. `one_by_one` looks up, touches and
    admits every member of an event, and of a prompt every use of it, before the next, as simulators of other caches
    do: more misses, since what the event needs next may have to go. `kinds` fills `Count.events`. Raises PolicyError
    for a policy that cannot be made, and TraceError for a damaged trace.
    """
    if one_by_one:
        trace = passes.one_by_one(trace)
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
            replay = _Replay(made, slots, group, kinds, trace.top_k, observer)
            for touch, sizes in chunk.touches():
                replay.event(touch, sizes)
    return counts


class _Replay:
    """The caches of one chunk's lanes at several capacities, under one policy."""

    def __init__(
        self, policy: EvictionPolicy, slots: Ints, counts: list[Count], kinds: bool, top_k: int, observer: Observer | None
    ) -> None:
        self.policy = policy
        self.slots = slots  # [capacities, lanes]
        self.counts = counts
        self.kinds = kinds
        self.top_k = top_k
        self.observer = observer
        self.resident = np.zeros((len(counts), policy.lanes.count, policy.lanes.width), np.bool_)
        self.held = np.zeros_like(slots)
        self._members = np.zeros((policy.lanes.count, policy.lanes.width), np.bool_)

    def event(self, touch: Touch, sizes: Ints | None) -> None:
        """One event in each of N lanes. `sizes` [N] is how many members each has, where that is not K for all."""
        policy, lanes, at = self.policy, touch.lanes, touch.at
        num_lanes, top = at.shape
        real = None if sizes is None else np.arange(top) >= top - sizes[:, None]
        sizes = np.full(num_lanes, top) if sizes is None else sizes
        flat = self.resident.reshape(len(self.counts), -1)
        was = flat[:, at]  # [C, N, K]
        if real is not None:
            was &= real
        hits = was.sum(axis=2)
        policy.touch(touch)

        self._members.reshape(-1)[at] = True
        members = self._members[lanes]
        held, slots, resident = self.held[:, lanes], self.slots[:, lanes], self.resident[:, lanes]
        wanted = held + sizes - hits
        after = np.minimum(wanted, slots)
        if policy.bypass:
            candidates = resident | members
            gone = wanted - after
        else:
            candidates = resident > members
            gone = np.minimum(wanted - after, held - hits)
        rounds = self._weakest(lanes, candidates, gone)
        if not policy.bypass:
            candidates |= members
            for c, lane in np.argwhere(sizes > slots).tolist():  # more members than room: the last touched stay
                candidates[c, lane] = False
                candidates[c].reshape(-1)[at[lane, top - slots[c, lane] :] - lanes.start * policy.lanes.width] = True
        resident[:] = candidates
        self._members.reshape(-1)[at] = False

        kept = flat[:, at]
        if real is not None:
            kept &= real
        admitted = kept > was
        self._count(sizes, hits, admitted, held, after)
        if self.kinds:
            self._count_kinds(touch, sizes, hits, regular=real is None)
        if policy.sees_cache or self.observer is not None:
            self._tell(touch, was, kept, admitted, rounds)
        self.held[:, lanes] = after

    def _weakest(self, lanes: slice, candidates: NDArray[np.bool_], gone: Ints) -> list[tuple[Ints, Ints, Ints]]:
        """Clear the `gone` weakest candidates of each lane; (capacities, lanes, columns), one of each lane a round."""
        if not gone.any():
            return []
        num_lanes, width = candidates.shape[1:]
        values = self.policy.checked_priorities(lanes)
        rounds = []
        flat = candidates.reshape(-1, width)
        for rows, columns in weakest(values, self.policy.recency[lanes], flat, gone.reshape(-1)):
            flat[rows, columns] = False
            rounds.append((*np.divmod(rows, num_lanes), columns))
        return rounds

    def _count(self, sizes: Ints, hits: Ints, admitted: NDArray[np.bool_], held: Ints, after: Ints) -> None:
        accesses = int(sizes.sum())
        for total, hit, new, before, now in zip(
            self.counts,
            hits.sum(axis=1).tolist(),
            np.count_nonzero(admitted, axis=(1, 2)).tolist(),
            held.sum(axis=1).tolist(),
            after.sum(axis=1).tolist(),
            strict=True,
        ):
            total.accesses += accesses
            total.hits += hit
            total.evictions += before + new - now
            total.bypasses += accesses - hit - new

    def _count_kinds(self, touch: Touch, sizes: Ints, hits: Ints, *, regular: bool) -> None:
        top = touch.at.shape[1]
        decode = touch.decode
        if regular and decode.all():
            for total, hit in zip(self.counts, hits, strict=True):
                for number, times in enumerate(np.bincount(hit).tolist()):
                    if times:
                        total.events[EventKind(True, 1, number, top - number)] += times
            return
        real = np.arange(top) >= top - sizes[:, None]
        tokens = (touch.tokens * real).sum(axis=1) // self.top_k
        for total, hit in zip(self.counts, hits, strict=True):
            kinds, times = np.unique(np.stack([decode, tokens, hit, sizes - hit], axis=1), axis=0, return_counts=True)
            for kind, n in zip(kinds.tolist(), times.tolist(), strict=True):
                total.events[EventKind(bool(kind[0]), *kind[1:])] += n

    def _tell(
        self,
        touch: Touch,
        was: NDArray[np.bool_],
        kept: NDArray[np.bool_],
        admitted: NDArray[np.bool_],
        rounds: list[tuple[Ints, Ints, Ints]],
    ) -> None:
        """Call the policy's hooks as the live cache does: what goes, weakest first, then what comes, as touched."""
        width, first = self.policy.lanes.width, touch.lanes.start
        gone = []
        for c, lane, column in rounds:
            at = (lane + first) * width + column
            there = ~(touch.at[lane] == at[:, None]).any(axis=1) | self._was_there(touch, was, c, lane, at)
            gone.append((c[there], at[there]))
        surrendered = was > kept
        if not self.policy.bypass:
            for k in range(touch.at.shape[1]):
                c, lane = surrendered[:, :, k].nonzero()
                gone.append((c, touch.at[lane, k]))
        come = [(c, touch.at[lane, k]) for k in range(touch.at.shape[1]) for c, lane in [admitted[:, :, k].nonzero()]]
        if self.observer is not None:
            self.observer(touch, gone, come)
        if self.policy.sees_cache:  # one capacity
            for _, at in gone:
                if len(at):
                    self.policy.on_evict(at)
            for _, at in come:
                if len(at):
                    self.policy.on_insert(at)

    @staticmethod
    def _was_there(touch: Touch, was: NDArray[np.bool_], c: Ints, lane: Ints, at: Ints) -> NDArray[np.bool_]:
        """Whether a member that goes was resident: what was only passing through is not evicted."""
        there: NDArray[np.bool_] = ((touch.at[lane] == at[:, None]) & was[c, lane]).any(axis=1)
        return there
