"""Which experts one tier holds: a state machine over ids and bytes that moves nothing itself.

    MISS --reserve, admit--> PENDING --commit--> RESIDENT
      ^                         |                   |
      +----------abort----------+                   |
      +----------evict, or a victim of the others---+

The cache decides, somebody else copies: `reserve` and `admit` make room before the first byte moves, `commit` says that
the last one has arrived.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy
from cache.selection import weakest_first
from cache.types import ExpertKey, Tier


class State(Enum):
    """Where an expert stands at one tier."""

    MISS = "miss"
    PENDING = "pending"
    RESIDENT = "resident"


@dataclass(slots=True)
class _Entry:
    key: ExpertKey
    index: int
    """Of the expert among all of the model's."""
    lane: int
    nbytes: int
    state: State = State.PENDING
    pins: int = 0
    evictable: bool = False
    """RESIDENT and without a pin; `ExpertCache._mark` keeps it."""


@dataclass(slots=True)
class Admission:
    """What a cache decided for the missing experts of an event: `admitted` ones have room, the others are streamed.

    `evicted` made room and are needed by nobody; `surrendered` are members of the event that give their place up to
    other members once they have been used: whoever carries this out copies nothing into their slots before.
    """

    admitted: list[ExpertKey] = field(default_factory=list)
    evicted: list[ExpertKey] = field(default_factory=list)
    surrendered: list[ExpertKey] = field(default_factory=list)


class ExpertCache:
    """The experts of one tier, inside byte capacities that are never exceeded.

    `capacities` are the bytes of each of the policy's lanes. Single-threaded by contract: one thread makes every
    call, so the order of decisions is the order of the calls. Misuse raises RuntimeError (a transition or unpin that
    the key's state does not allow) or ValueError (an expert that does not exist, a size that is not positive) and
    changes nothing.
    """

    def __init__(self, tier: Tier, capacities: Sequence[int], policy: EvictionPolicy) -> None:
        lanes = policy.lanes
        if len(capacities) != lanes.count or min(capacities) < 0:
            raise ValueError(f"a cache of {capacities} bytes for {lanes.count} lanes")
        self.tier = tier
        self.policy = policy
        self.capacities = list(capacities)
        """Bytes of each lane."""
        self.used = [0] * lanes.count
        """Bytes of RESIDENT and PENDING experts together, of each lane."""
        self.peak_bytes = 0
        """The most that all lanes together have used, since the start or `reset_peak`."""
        self._used_bytes = 0
        self._width = lanes.width
        self._experts = lanes.experts
        keys = [ExpertKey(layer, e) for layer in range(policy.num_layers) for e in range(lanes.experts)]
        self._keys_of = [keys[first : first + lanes.width] for first in range(0, len(keys), lanes.width)]
        self._entries: dict[ExpertKey, _Entry] = {}
        self._in_use: Sequence[ExpertKey] = ()
        self._favoured: Collection[ExpertKey] = ()
        self._ranking: NDArray[np.float64] | None = None
        # One byte an expert, seen as Python's bytes and as NumPy's bools: each is fast where the other is not.
        self._evictable = bytearray(lanes.count * lanes.width)
        self._evictable_rows = np.frombuffer(self._evictable, np.bool_).reshape(lanes.count, lanes.width)
        self._evictable_bytes = [0] * lanes.count

    @property
    def capacity_bytes(self) -> int:
        """Of all lanes together."""
        return sum(self.capacities)

    @property
    def used_bytes(self) -> int:
        """Bytes of RESIDENT and PENDING experts together."""
        return self._used_bytes

    def free_bytes(self, layer: int) -> int:
        """Bytes of the layer's lane that nothing uses."""
        lane = layer * self._experts // self._width
        return self.capacities[lane] - self.used[lane]

    def state(self, key: ExpertKey) -> State:
        """Where `key` stands now."""
        entry = self._entries.get(key)
        return entry.state if entry else State.MISS

    def look_up(self, keys: Iterable[ExpertKey]) -> tuple[list[ExpertKey], list[ExpertKey], list[ExpertKey]]:
        """Those of `keys` that are RESIDENT, PENDING and MISS, each in their order."""
        resident: list[ExpertKey] = []
        pending: list[ExpertKey] = []
        missing: list[ExpertKey] = []
        entries = self._entries
        for key in keys:
            entry = entries.get(key)
            if entry is None:
                missing.append(key)
            else:
                (resident if entry.state is State.RESIDENT else pending).append(key)
        return resident, pending, missing

    def resident(self) -> list[ExpertKey]:
        """The RESIDENT experts, in the order in which they were reserved."""
        return [entry.key for entry in self._entries.values() if entry.state is State.RESIDENT]

    def pending(self) -> list[ExpertKey]:
        """The PENDING experts, in the order in which they were reserved."""
        return [entry.key for entry in self._entries.values() if entry.state is State.PENDING]

    def pinned(self) -> list[ExpertKey]:
        """The experts with at least one pin, in the order in which they were reserved."""
        return [entry.key for entry in self._entries.values() if entry.pins]

    def evictable_bytes(self, protected: Collection[ExpertKey] = ()) -> int:
        """Bytes of RESIDENT experts that are neither pinned, in use, nor in `protected`."""
        kept = (self._entries.get(key) for key in {*protected, *self._in_use})
        return sum(self._evictable_bytes) - sum(entry.nbytes for entry in kept if entry and entry.evictable)

    def reserve(self, key: ExpertKey, nbytes: int, protected: Collection[ExpertKey] = ()) -> list[ExpertKey] | None:
        """MISS -> PENDING. Returns the experts evicted to make room: those of lowest priority, in order.

        Evicts no more than are needed, and never one that is pinned, pending, in use or in `protected`. If evicting
        everything else would not make room, changes nothing and returns None. Side effects: `policy.on_evict`
        for each victim, then `policy.on_insert` for `key`.
        """
        victims = self.victims(key, nbytes, protected)
        if victims is None:
            return None
        for victim in victims:
            self._drop(self._entries[victim])
        self._add(key, nbytes)
        return victims

    def victims(self, key: ExpertKey, nbytes: int, protected: Collection[ExpertKey] = ()) -> list[ExpertKey] | None:
        """What `reserve` would evict, and would return; changes nothing."""
        lane = self._check_missing(key, nbytes)
        excess = self.used[lane] + nbytes - self.capacities[lane]
        victims: list[ExpertKey] = []
        if excess > 0:
            for column in self._weakest(lane, protected):
                victims.append(self._keys_of[lane][column])
                excess -= self._entries[victims[-1]].nbytes
                if excess <= 0:
                    break
            else:
                return None
        return victims

    def admit(self, members: Sequence[ExpertKey], nbytes: int) -> Admission:
        """Make room for what an event misses: its members that are MISS become PENDING, or are streamed.

        `members` are all of one layer, in touch order; `nbytes` is the size of each that is missing. After the event
        the cache holds the best of what it held and the members: under a policy of forced admission members are
        better than all others, and among themselves the later touched; under one that bypasses, or a ranking, priority
        alone says.
        Pinned and pending experts keep their places. Side effects: `policy.on_evict` for each that goes, weakest
        first, then `policy.on_insert` for each admitted, in touch order. Nothing changes if the policy raises.
        """
        result = Admission()
        entries = self._entries
        missing = [key for key in members if key not in entries]
        if not missing:
            return result
        for key in missing:
            lane = self._check_missing(key, nbytes)
        excess = self.used[lane] + nbytes * len(missing) - self.capacities[lane]
        dropped: list[_Entry] = []
        streamed: set[ExpertKey] = set()
        if excess > 0:
            for key in self._drop_order(lane, members, missing):
                entry = entries.get(key)
                if entry is None:
                    streamed.add(key)
                    excess -= nbytes
                else:
                    dropped.append(entry)
                    excess -= entry.nbytes
                if excess <= 0:
                    break
        for entry in dropped:
            self._drop(entry)
            (result.surrendered if entry.key in members else result.evicted).append(entry.key)
        for key in missing:
            if key not in streamed:
                self._add(key, nbytes)
                result.admitted.append(key)
        return result

    def commit(self, key: ExpertKey) -> None:
        """PENDING -> RESIDENT: the bytes have arrived."""
        entry = self._entry(key, "commit")
        if entry.state is not State.PENDING:
            raise RuntimeError(f"commit of {key}, which is {entry.state.value}")
        entry.state = State.RESIDENT
        if not entry.pins:
            self._mark(entry, True)

    def abort(self, key: ExpertKey) -> None:
        """PENDING -> MISS: the transfer will not complete, its bytes are free. Unpin a pinned key first.

        Side effect: `policy.on_evict`.
        """
        entry = self._entry(key, "abort")
        if entry.state is not State.PENDING or entry.pins:
            raise RuntimeError(f"abort of {key}, which is {entry.state.value} with {entry.pins} pins")
        self._drop(entry)

    def evict(self, key: ExpertKey) -> None:
        """RESIDENT -> MISS. Side effect: `policy.on_evict`."""
        entry = self._entry(key, "evict")
        if not entry.evictable:
            raise RuntimeError(f"evict of {key}, which is {entry.state.value} with {entry.pins} pins")
        self._drop(entry)

    def pin(self, key: ExpertKey) -> None:
        """Keep a RESIDENT or PENDING expert until as many `unpin` calls as there were `pin` calls."""
        entry = self._entry(key, "pin")
        if entry.evictable:
            self._mark(entry, False)
        entry.pins += 1

    def unpin(self, key: ExpertKey) -> None:
        """Take one pin back."""
        entry = self._entry(key, "unpin")
        if not entry.pins:
            raise RuntimeError(f"unpin of {key}, which has no pin")
        entry.pins -= 1
        if not entry.pins and entry.state is State.RESIDENT:
            self._mark(entry, True)

    def use(self, keys: Sequence[ExpertKey]) -> None:
        """Keep what is held of `keys` until the next call: an event is using it. Without keys: nothing is in use."""
        self._in_use = keys

    def favour(self, keys: Collection[ExpertKey]) -> None:
        """Until the next call, evict what is held of `keys` only where nothing else may go: it will soon be needed."""
        self._favoured = keys

    def rank(self, values: NDArray[np.float64] | None) -> None:
        """Until the next call, `values` [layers, experts] decide what goes and what is admitted, the lowest first; as
        ever, the less recently used of equals. A missing expert that is worth less than all that may go is streamed.

        The policy sees every event all the same; with None it decides again. The array is read when something has to
        go, so its owner may go on changing it.
        """
        self._ranking = None if values is None else values.reshape(len(self.capacities), self._width)

    def among_highest(self, key: ExpertKey, nbytes: int, spare: int) -> bool:
        """Whether the ranking has `key` among the experts that fill its lane, of `nbytes` each, but for `spare` places.

        False without a ranking, and for what ties with one that is not among them.
        """
        if self._ranking is None:
            return False
        lane, column = divmod(key.layer * self._experts + key.expert, self._width)
        values = self._ranking[lane]
        return int(np.count_nonzero(values >= values[column])) <= self.capacities[lane] // nbytes - spare

    def clear(self) -> None:
        """Evict everything, and let the policy forget everything. Raises RuntimeError while something is held."""
        self.check_integrity(idle=True)
        for entry in list(self._entries.values()):
            self._drop(entry)
        self._favoured = ()
        self.policy.reset()

    def reset_peak(self) -> None:
        """Measure `peak_bytes` from now on."""
        self.peak_bytes = self._used_bytes

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise RuntimeError naming what is inconsistent; with `idle`, also what is pending or pinned."""
        problems = []
        for lane, capacity in enumerate(self.capacities):
            entries = [entry for entry in self._entries.values() if entry.lane == lane]
            used = sum(entry.nbytes for entry in entries)
            evictable = {entry.key for entry in entries if entry.evictable}
            marked = {self._keys_of[lane][column] for column in self._evictable_rows[lane].nonzero()[0].tolist()}
            evictable_bytes = sum(entry.nbytes for entry in entries if entry.evictable)
            where = f"lane {lane}: " if len(self.capacities) > 1 else ""
            if self.used[lane] != used:
                problems.append(f"{where}used_bytes is {self.used[lane]}, its experts have {used}")
            if used > capacity:
                problems.append(f"{where}{used} bytes are used of {capacity}")
            if marked != evictable:
                problems.append(f"{where}wrongly marked evictable or not: {sorted(marked ^ evictable)}")
            if self._evictable_bytes[lane] != evictable_bytes:
                problems.append(
                    f"{where}{self._evictable_bytes[lane]} evictable bytes are counted, there are {evictable_bytes}"
                )
        if self._used_bytes != sum(self.used):
            problems.append(f"used_bytes is {self._used_bytes}, its lanes have {sum(self.used)}")
        if self.peak_bytes < self._used_bytes:
            problems.append(f"peak_bytes is {self.peak_bytes}, {self._used_bytes} are used")
        if idle and (self.pending() or self.pinned() or self._in_use):
            problems.append(f"not idle: pending {self.pending()}, pinned {self.pinned()}, in use {list(self._in_use)}")
        if problems:
            raise RuntimeError(f"{self.tier.value} cache: " + "; ".join(problems))

    def _drop_order(self, lane: int, members: Sequence[ExpertKey], missing: list[ExpertKey]) -> Iterator[ExpertKey]:
        """Everything that may end up without a place in `lane` after an event, in the order in which it does."""
        keys = self._keys_of[lane]
        if self.policy.bypass or self._ranking is not None:
            # The missing members stand for their places beside the others.
            return map(keys.__getitem__, self._weakest(lane, (), also=missing))
        others = map(keys.__getitem__, self._weakest(lane, members))
        entries = self._entries
        return chain(others, (key for key in members if key not in entries or entries[key].evictable))

    def _weakest(self, lane: int, protected: Iterable[ExpertKey], also: Collection[ExpertKey] = ()) -> Iterator[int]:
        """The columns of `lane` that may be evicted and are not `protected`, and those of `also`, weakest first."""
        candidates = self._evictable_rows[lane].copy()
        self._set(candidates, lane, protected, False)
        if self._in_use:
            self._set(candidates, lane, self._in_use, False)
        if self._favoured:
            favoured = np.zeros_like(candidates)
            self._set(favoured, lane, self._favoured, True)
            favoured &= candidates
            if favoured.any():
                candidates &= ~favoured
                self._set(candidates, lane, also, True)
                return chain(self._order(candidates, lane), self._order(favoured, lane))
        if also:
            self._set(candidates, lane, also, True)
        return self._order(candidates, lane)

    def _order(self, candidates: NDArray[np.bool_], lane: int) -> Iterator[int]:
        """The columns of `lane` marked in `candidates`, weakest first."""
        if self._ranking is None:
            return self.policy.eviction_order(candidates, lane)
        return weakest_first(self._ranking[lane], self.policy.recency[lane], candidates)

    def _set(self, columns: NDArray[np.bool_], lane: int, keys: Iterable[ExpertKey], value: bool) -> None:
        """Mark those of `keys` that are in `lane`."""
        experts, width, first = self._experts, self._width, lane * self._width
        for layer, expert in keys:
            column = layer * experts + expert - first
            if 0 <= column < width:
                columns[column] = value

    def _check_missing(self, key: ExpertKey, nbytes: int) -> int:
        """The lane of `key`, if room may be made for it."""
        layer, expert = key
        if not (0 <= expert < self._experts and 0 <= layer < self.policy.num_layers):
            raise ValueError(f"{key} is outside {self.policy.num_layers} layers of {self._experts} experts")
        if nbytes <= 0:
            raise ValueError(f"{key} of {nbytes} bytes")
        if key in self._entries:
            raise RuntimeError(f"reserve of {key}, which is {self.state(key).value}")
        return (layer * self._experts + expert) // self._width

    def _entry(self, key: ExpertKey, action: str) -> _Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise RuntimeError(f"{action} of {key}, which is {State.MISS.value}")
        return entry

    def _add(self, key: ExpertKey, nbytes: int) -> None:
        index = key.layer * self._experts + key.expert
        lane = index // self._width
        self._entries[key] = _Entry(key, index, lane, nbytes)
        self.used[lane] += nbytes
        self._used_bytes += nbytes
        if self._used_bytes > self.peak_bytes:
            self.peak_bytes = self._used_bytes
        if self.policy.sees_cache:
            self.policy.on_insert(np.array([index]))

    def _drop(self, entry: _Entry) -> None:
        if entry.evictable:
            self._mark(entry, False)
        del self._entries[entry.key]
        self.used[entry.lane] -= entry.nbytes
        self._used_bytes -= entry.nbytes
        if self.policy.sees_cache:
            self.policy.on_evict(np.array([entry.index]))

    def _mark(self, entry: _Entry, evictable: bool) -> None:
        entry.evictable = evictable
        self._evictable[entry.index] = evictable
        self._evictable_bytes[entry.lane] += entry.nbytes if evictable else -entry.nbytes
