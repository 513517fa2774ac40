"""Counting replay: which accesses would have hit, for many caches at once. Equal sizes, on demand only, no clock.

Every sequence, layer and capacity is a lane, and all lanes take their step at the same time: one call of the policy's
`touch` and `priorities` serves them all. The rules are those of `ExpertCache.admit`, so hits, misses and victims are
those of the live decision loop: an event's members are looked up against the state before it; after it a lane holds
the best of what it held and the members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.counting.count import Count, EventKind
from cache.counting.schedule import Schedule, warm_up_passes
from cache.lanes import Ints, Lanes, Touch
from cache.policy import EvictionPolicy, find_policy, make_policy
from cache.selection import weakest
from cache.traces import one_by_one as alone
from cache.traces.trace import Trace

Moves = list[tuple[Ints, Ints]]
"""Experts that went, or came, one a lane and round: (capacities, flat indices)."""

Observer = Callable[[Touch, Moves, Moves], None]
"""Told of every event: the touch, what went and what came, in order. Flat indices are the touch's."""


def count(
    trace: Trace,
    policy: str,
    capacities: Sequence[Sequence[int]],
    *,
    pool: str = "layer",
    cold: bool = True,
    warm_up: int = 0,
    one_by_one: bool = False,
    profile: Trace | None = None,
    kinds: bool = False,
    observer: Observer | None = None,
) -> list[Count]:
    """Replay `trace` under `policy` at each of `capacities`: experts that fit, one number a layer, or one for all.

    `pool` is "layer" (a cache for each layer) or "global" (one for all); `cold` empties caches, counters and policy
    at every sequence, else they are kept from one to the next, starting empty, and the first `warm_up` sequences are
    not counted. `one_by_one` looks up, touches and
    admits every member of an event, and of a prompt every use of it, before the next, as simulators of other caches
    do: more misses, since what the event needs next may have to go. `kinds` fills `Count.events`. Raises PolicyError
    for a policy that cannot be made, and TraceError for a damaged trace, and where `warm_up` leaves nothing to count.
    """
    if warm_up and cold:
        raise ValueError("a cold replay has no warm-up")
    skipped = warm_up_passes(trace, warm_up)
    if one_by_one:
        trace = alone.one_by_one(trace)
    cls = find_policy(policy)
    counts = [Count(tuple(slots)) for slots in capacities]
    # A rule that never looks at the cache has one state for all capacities; else each has lanes of its own.
    copies = len(counts) if cls.sees_cache else 1
    schedule = Schedule(trace, pool=pool, cold=cold, copies=copies)
    for chunk in schedule.chunks():
        slots = np.array([np.tile(c.slots, chunk.units // copies) for c in counts], np.int64)
        if copies > 1:
            slots = np.array([np.tile([c.slots for c in counts], (chunk.units // copies, 1)).ravel()], np.int64)
        lanes = Lanes(trace.num_layers, schedule.layers_per_lane, trace.num_experts, slots[0])
        made = make_policy(policy, lanes, profile)
        if not made.causal:
            made.foresee(chunk)
        replay = _Replay(made, slots, counts, kinds, trace.top_k, observer)
        for touch in chunk.touches():
            if skipped and touch.time == skipped * chunk.times_per_pass:
                replay.restart()
            replay.event(touch)
        replay.finish()
    return counts


class _Replay:
    """The caches of one chunk's lanes at several capacities, under one policy."""

    def __init__(
        self,
        policy: EvictionPolicy,
        slots: Ints,
        counts: list[Count],
        kinds: bool,
        top_k: int,
        observer: Observer | None,
    ) -> None:
        self.policy = policy
        self.slots = slots  # [capacities, lanes]; [1, lanes] where every capacity has lanes of its own
        self.counts = counts
        self.kinds = kinds
        self.top_k = top_k
        self.observer = observer
        self.resident = np.zeros((len(slots), policy.lanes.count, policy.lanes.width), np.bool_)
        self.held = np.zeros_like(slots)
        self._members = np.zeros((policy.lanes.count, policy.lanes.width), np.bool_)
        self._tells = policy.sees_cache or observer is not None
        self._least_slots = int(slots.min())
        self._lanes_each = policy.num_layers // policy.lanes.layers
        self._hits, self._evictions, self._bypasses, self._exchanges = np.zeros((4, *slots.shape), np.int64)
        self._accesses = 0

    def finish(self) -> None:
        """Add what was counted to the counts."""
        counted = self._hits, self._evictions, self._bypasses, self._exchanges
        sums = (self._by_capacity(each).sum(axis=1).tolist() for each in counted)
        for total, hits, evictions, bypasses, exchanges in zip(self.counts, *sums, strict=True):
            total.accesses += self._accesses * len(self.slots) // len(self.counts)
            total.hits += hits
            total.evictions += evictions
            total.bypasses += bypasses
            total.exchanges += exchanges

    def restart(self) -> None:
        """Count from zero; caches and the policy stay as they are."""
        self._accesses = 0
        for sums in (self._hits, self._evictions, self._bypasses, self._exchanges):
            sums[:] = 0
        for total in self.counts:
            total.events.clear()

    def event(self, touch: Touch) -> None:
        """One event in each of N lanes."""
        policy, lanes, at = self.policy, touch.lanes, touch.at
        num_lanes, top = at.shape
        flat = self.resident.reshape(len(self.slots), -1)
        was = flat[:, at]  # [C, N, K]
        real = None
        sizes: Any = top
        if touch.sizes is not None:
            sizes = touch.sizes
            real = np.arange(top) >= top - sizes[:, None]
            was &= real
        hits = was.sum(axis=2)
        policy.touch(touch)

        held, slots, resident = self.held[:, lanes], self.slots[:, lanes], self.resident[:, lanes]
        wanted = held + sizes - hits
        after = np.minimum(wanted, slots)
        self._members.reshape(-1)[at] = True
        members = self._members[lanes]
        if policy.bypass:
            candidates = resident | members
            gone = wanted - after
        else:
            candidates = resident > members
            gone = np.minimum(wanted - after, held - hits)
        rounds = self._weakest(lanes, candidates, gone)
        if not policy.bypass:
            candidates |= members
            if top > self._least_slots:
                self._keep_last(candidates, at, np.broadcast_to(sizes, num_lanes), slots)
        resident[:] = candidates
        self._members.reshape(-1)[at] = False

        self._accesses += num_lanes * top if real is None else int(sizes.sum())
        self._hits[:, lanes] += hits
        self._evictions[:, lanes] += wanted - after
        if policy.bypass or top > self._least_slots or self._tells:
            kept = flat[:, at]
            if real is not None:
                kept &= real
            bypassed = sizes - hits - (kept > was).sum(axis=2)
            self._bypasses[:, lanes] += bypassed
            self._evictions[:, lanes] -= bypassed  # these never came in
            if self._tells:
                self._tell(touch, was, kept, rounds)
        if self.kinds:
            self._count_kinds(touch, hits)
        self.held[:, lanes] = after
        if policy.exchanges:
            self._exchange()

    @staticmethod
    def _keep_last(candidates: NDArray[np.bool_], at: Ints, sizes: Ints, slots: Ints) -> None:
        """Where an event has more members than there is room for, the last touched stay, and nothing else."""
        width, top = candidates.shape[2], at.shape[1]
        c, lane = (sizes > slots).nonzero()
        room = slots[c, lane]
        candidates[c, lane] = False
        for place in range(room.max(initial=0)):  # the last touched, the one before, ...
            has = room > place
            here = lane[has]
            candidates[c[has], here, at[here, top - 1 - place] - here * width] = True

    def _exchange(self) -> None:
        """What the policy brings in by itself, and sends away for it. It sees the cache: there is one row of lanes."""
        resident = self.resident.reshape(-1)
        for come, gone in self.policy.exchange():
            resident[gone], resident[come] = False, True
            self.policy.on_evict(gone)
            self.policy.on_insert(come)
            for counted in (self._evictions, self._exchanges):
                counted[0, come // self.policy.lanes.width] += 1

    def _weakest(self, lanes: slice, candidates: NDArray[np.bool_], gone: Ints) -> list[tuple[Ints, Ints]]:
        """Clear the `gone` weakest candidates of each lane, one of each lane a round: (rows of [C * N], columns)."""
        if not gone.any():
            return []
        values = self.policy.checked_priorities(lanes)
        rounds = []
        flat = candidates.reshape(-1, candidates.shape[2])
        for rows, columns in weakest(values, self.policy.recency[lanes], flat, gone.reshape(-1)):
            flat[rows, columns] = False
            rounds.append((rows, columns))
        return rounds

    def _by_capacity(self, values: NDArray[Any]) -> NDArray[Any]:
        """`values` [capacities, N], or [N] for all of them, as [capacities, n], the lanes of each."""
        capacities = len(self.counts)
        if len(self.slots) == capacities:
            return np.broadcast_to(values, (capacities, values.shape[-1]))
        by_unit = values.reshape(-1, capacities, self._lanes_each)
        lanes: NDArray[Any] = by_unit.swapaxes(0, 1).reshape(capacities, -1)
        return lanes

    def _count_kinds(self, touch: Touch, hits: Ints) -> None:
        num_lanes, top = touch.at.shape
        hits = self._by_capacity(hits)
        if touch.sizes is None and touch.decode.all():
            for total, hit in zip(self.counts, hits, strict=True):
                for number, times in enumerate(np.bincount(hit).tolist()):
                    if times:
                        total.events[EventKind(True, 1, number, top - number)] += times
            return
        sizes = np.full(num_lanes, top) if touch.sizes is None else touch.sizes
        real = np.arange(top) >= top - sizes[:, None]
        tokens = (touch.tokens * real).sum(axis=1) // self.top_k
        rows = (hits, *map(self._by_capacity, (touch.decode, tokens, sizes)))
        for total, hit, decode, token, size in zip(self.counts, *rows, strict=True):
            kinds, times = np.unique(np.stack([decode, token, hit, size - hit], axis=1), axis=0, return_counts=True)
            for (decoding, *kind), n in zip(kinds.tolist(), times.tolist(), strict=True):
                total.events[EventKind(bool(decoding), *kind)] += n

    def _tell(
        self, touch: Touch, was: NDArray[np.bool_], kept: NDArray[np.bool_], rounds: list[tuple[Ints, Ints]]
    ) -> None:
        """Call the policy's hooks as the live cache does: what goes, weakest first, then what comes, as touched."""
        at, width = touch.at, self.policy.lanes.width
        gone = []
        for rows, columns in rounds:
            c, lane = np.divmod(rows, len(at))
            flat = lane * width + columns
            if self.policy.bypass:
                here = at[lane] == flat[:, None]
                passing = here.any(axis=1) & ~(here & was[c, lane]).any(axis=1)  # a member that was never resident
                c, flat = c[~passing], flat[~passing]
            gone.append((c, flat))
        if not self.policy.bypass:
            gone += self._column_wise(was > kept, at)
        come = self._column_wise(kept > was, at)
        if self.observer is not None:
            self.observer(touch, gone, come)
        if self.policy.sees_cache:
            for hook, moves in ((self.policy.on_evict, gone), (self.policy.on_insert, come)):
                for _, moved in moves:
                    if len(moved):
                        hook(moved)

    @staticmethod
    def _column_wise(chosen: NDArray[np.bool_], at: Ints) -> Moves:
        """The members `chosen` [C, N, K], one of each lane a round, in touch order."""
        return [(c, at[lane, k]) for k in range(at.shape[1]) for c, lane in [chosen[:, :, k].nonzero()]]
