"""Which experts one tier holds: a state machine over ids and bytes that moves nothing itself.

    MISS --reserve, admit--> PENDING --commit--> RESIDENT
      ^                         |                   |
      +----------abort----------+                   |
      +---------------a victim of the others--------+

The cache decides, somebody else copies: `reserve` and `admit` make room before the first byte moves, `commit` says that
the last one has arrived.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from cache.holdings import Entry, Holdings, State
from cache.types import ExpertKey


@dataclass(slots=True)
class Admission:
    """What a cache decided for the missing experts of an event: `admitted` ones have room, the others are streamed.

    `evicted` made room and are needed by nobody; `surrendered` are members of the event that give their place up to
    other members once they have been used: whoever carries this out copies nothing into their slots before.
    """

    admitted: list[ExpertKey]
    evicted: list[ExpertKey]
    surrendered: list[ExpertKey]


class ExpertCache(Holdings):
    """The experts of one tier, inside byte capacities that are never exceeded.

    Single-threaded by contract: one thread makes every call, so the order of decisions is the order of the calls.
    Misuse raises RuntimeError (a transition or unpin that the key's state does not allow) or ValueError (an expert that
    does not exist, a size that is not positive) and changes nothing.
    """

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
        lane = self._check_missing((key,), nbytes)
        return self._weakest(lane, self.used[lane] + nbytes - self.capacities[lane], protected)

    def resize(
        self, slots: Sequence[int], nbytes: int, protected: Collection[ExpertKey] = ()
    ) -> list[ExpertKey] | None:
        """Give each lane room for so many experts of `nbytes`, of all lanes together no more than now. Returns the
        experts evicted: from lanes that hold more than that, those of lowest priority, in order.

        A lane that grows keeps all. Evicts no more than are needed, and never one that is pinned, pending, in use or in
        `protected`. If evicting everything else would not do, changes nothing and returns None. Side effects:
        `policy.on_evict` for each victim, then `policy.resize`.
        """
        capacities = [count * nbytes for count in slots]
        if len(slots) != len(self.capacities) or min(capacities) < 0 or sum(capacities) > self.capacity_bytes:
            raise ValueError(f"{slots} experts of {nbytes} bytes for lanes of {self.capacities}")
        victims: list[ExpertKey] = []
        for lane, capacity in enumerate(capacities):
            gone = self._weakest(lane, self.used[lane] - capacity, protected)
            if gone is None:
                return None
            victims += gone
        for victim in victims:
            self._drop(self._entries[victim])
        self.capacities = capacities
        self.policy.resize(np.array(slots, np.int64))
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
        entries = self._entries
        missing = [key for key in members if key not in entries]
        if not missing:
            return Admission([], [], [])
        lane = self._check_missing(missing, nbytes)
        excess = self.used[lane] + nbytes * len(missing) - self.capacities[lane]
        dropped: list[Entry] = []
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
        evicted: list[ExpertKey] = []
        surrendered: list[ExpertKey] = []
        for entry in dropped:
            self._drop(entry)
            (surrendered if entry.key in members else evicted).append(entry.key)
        admitted = [key for key in missing if key not in streamed] if streamed else missing
        for key in admitted:
            self._add(key, nbytes)
        return Admission(admitted, evicted, surrendered)

    def commit(self, key: ExpertKey) -> None:
        """PENDING -> RESIDENT: the bytes have arrived."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not State.PENDING:
            raise RuntimeError(f"commit of {key}, which is {self.state(key).value}")
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
        self._candidates.in_use = keys

    def favour(self, keys: Collection[ExpertKey]) -> None:
        """Until the next call, evict what is held of `keys` only where nothing else may go: it will soon be needed."""
        self._candidates.favoured = keys

    def rank(self, values: NDArray[np.float64] | None) -> None:
        """Until the next call, `values` [layers, experts] decide what goes and what is admitted, the lowest first; as
        ever, the less recently used of equals. A missing expert that is worth less than all that may go is streamed.

        The policy sees every event all the same; with None it decides again. The array is read when something has to
        go, so its owner may go on changing it.
        """
        self._candidates.rank(values)

    def among_highest(self, key: ExpertKey, nbytes: int, spare: int) -> bool:
        """Whether the ranking has `key` among the experts that fill its lane, of `nbytes` each, but for `spare` places.

        False without a ranking, and for what ties with one that is not among them.
        """
        index = key.layer * self._experts + key.expert
        return self._candidates.among_highest(index, self.capacities[index // self._width] // nbytes - spare)

    def clear(self) -> None:
        """Evict everything, and let the policy forget everything. Raises RuntimeError while something is held."""
        self.check_integrity(idle=True)
        for entry in list(self._entries.values()):
            self._drop(entry)
        self._candidates.favoured = ()
        self.policy.reset()

    def start_over(self) -> None:
        """As `clear`, in whatever state an error has left this, and without a word to the policy of what it held."""
        self._hold_nothing()
        self.policy.reset()

    def _weakest(self, lane: int, excess: int, protected: Collection[ExpertKey]) -> list[ExpertKey] | None:
        """The first to go from `lane` for so many bytes more than fit; None if all that may go are not enough."""
        victims: list[ExpertKey] = []
        if excess > 0:
            for victim in self._candidates.weakest(lane, protected):
                victims.append(victim)
                excess -= self._entries[victim].nbytes
                if excess <= 0:
                    break
            else:
                return None
        return victims

    def _drop_order(self, lane: int, members: Sequence[ExpertKey], missing: list[ExpertKey]) -> Iterator[ExpertKey]:
        """Everything that may end up without a place in `lane` after an event, in the order in which it does."""
        if self.policy.bypass or self._candidates.ranking is not None:
            # The missing members stand for their places beside the others.
            return self._candidates.weakest(lane, (), also=missing)
        others = self._candidates.weakest(lane, members)
        entries = self._entries
        return chain(others, (key for key in members if key not in entries or entries[key].evictable))

    def _check_missing(self, keys: Iterable[ExpertKey], nbytes: int) -> int:
        """The lane of `keys`, if room may be made for them; it is that of the last one."""
        layers, experts = self.policy.num_layers, self._experts
        for key in keys:
            layer, expert = key
            if not (0 <= expert < experts and 0 <= layer < layers):
                raise ValueError(f"{key} is outside {layers} layers of {experts} experts")
            if nbytes <= 0:
                raise ValueError(f"{key} of {nbytes} bytes")
            if key in self._entries:
                raise RuntimeError(f"reserve of {key}, which is {self.state(key).value}")
        return (layer * experts + expert) // self._width
