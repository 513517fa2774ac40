"""Which experts one tier holds: a state machine over ids and bytes that moves nothing itself.

    MISS --reserve--> PENDING --commit--> RESIDENT
      ^                  |                    |
      +------abort-------+                    |
      +------evict, or a victim of reserve----+

The cache decides, somebody else copies: `reserve` makes room before the first byte moves, `commit` says that
the last one has arrived.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

import numpy as np

from cache.policy import EvictionPolicy
from cache.types import ExpertKey, Tier


class State(Enum):
    """Where an expert stands at one tier."""

    MISS = "miss"
    PENDING = "pending"
    RESIDENT = "resident"


@dataclass(slots=True)
class _Entry:
    nbytes: int
    state: State = State.PENDING
    pins: int = 0

    @property
    def evictable(self) -> bool:
        return self.state is State.RESIDENT and not self.pins


class ExpertCache:
    """The experts of one tier, or of one pool of it, inside a byte capacity that is never exceeded.

    Single-threaded by contract: one thread makes every call, so the order of decisions is the order of the
    calls. Misuse raises RuntimeError (a transition or unpin that the key's state does not allow) or
    ValueError (an expert outside the pool, a size that is not positive) and changes nothing.

    `layers` is the range of layers that this pool serves (step 1); all of the policy's by default.
    """

    def __init__(self, tier: Tier, capacity_bytes: int, policy: EvictionPolicy, layers: range | None = None) -> None:
        layers = range(policy.num_layers) if layers is None else layers
        if capacity_bytes < 0:
            raise ValueError(f"a cache of {capacity_bytes} bytes")
        if layers.step != 1 or not layers or layers.start < 0 or layers.stop > policy.num_layers:
            raise ValueError(f"a cache for {layers} of {policy.num_layers} layers")
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.policy = policy
        self.layers = layers
        self.used_bytes = 0
        """Bytes of RESIDENT and PENDING experts together."""
        self.peak_bytes = 0
        """The most `used_bytes` has been, since the start or `reset_peak`."""
        self._entries: dict[ExpertKey, _Entry] = {}
        self._evictable = np.zeros((len(layers), policy.num_experts), np.bool_)
        self._evictable_bytes = 0

    def state(self, key: ExpertKey) -> State:
        """Where `key` stands now."""
        entry = self._entries.get(key)
        return entry.state if entry else State.MISS

    def resident(self) -> list[ExpertKey]:
        """The RESIDENT experts, in the order in which they were reserved."""
        return [key for key, entry in self._entries.items() if entry.state is State.RESIDENT]

    def pending(self) -> list[ExpertKey]:
        """The PENDING experts, in the order in which they were reserved."""
        return [key for key, entry in self._entries.items() if entry.state is State.PENDING]

    def pinned(self) -> list[ExpertKey]:
        """The experts with at least one pin, in the order in which they were reserved."""
        return [key for key, entry in self._entries.items() if entry.pins]

    def evictable_bytes(self, protected: Collection[ExpertKey] = ()) -> int:
        """Bytes of RESIDENT experts that are neither pinned nor in `protected`."""
        kept = (self._entries.get(key) for key in set(protected))
        return self._evictable_bytes - sum(entry.nbytes for entry in kept if entry and entry.evictable)

    def reserve(self, key: ExpertKey, nbytes: int, protected: Collection[ExpertKey] = ()) -> list[ExpertKey] | None:
        """MISS -> PENDING. Returns the experts evicted to make room: those of lowest priority, in order.

        Evicts no more than are needed, and never one that is pinned, pending or in `protected`. If evicting
        everything else would not make room, changes nothing and returns None. Side effects: `policy.on_evict`
        for each victim, then `policy.on_insert` for `key`.
        """
        if key.layer not in self.layers or not 0 <= key.expert < self.policy.num_experts:
            raise ValueError(f"{key} is outside {self.layers} of {self.policy.num_experts} experts")
        if nbytes <= 0:
            raise ValueError(f"{key} of {nbytes} bytes")
        if key in self._entries:
            raise RuntimeError(f"reserve of {key}, which is {self.state(key).value}")
        missing_bytes = self.used_bytes + nbytes - self.capacity_bytes
        if missing_bytes > 0 and missing_bytes > self.evictable_bytes(protected):
            return None
        victims = self._victims(missing_bytes, protected)
        for victim in victims:
            self._drop(victim)
        self._entries[key] = _Entry(nbytes)
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self.policy.on_insert(key)
        return victims

    def commit(self, key: ExpertKey) -> None:
        """PENDING -> RESIDENT: the bytes have arrived."""
        entry = self._entry(key, "commit")
        if entry.state is not State.PENDING:
            raise RuntimeError(f"commit of {key}, which is {entry.state.value}")
        entry.state = State.RESIDENT
        if not entry.pins:
            self._mark(key, entry, evictable=True)

    def abort(self, key: ExpertKey) -> None:
        """PENDING -> MISS: the transfer will not complete, its bytes are free. Unpin a pinned key first.

        Side effect: `policy.on_evict`.
        """
        entry = self._entry(key, "abort")
        if entry.state is not State.PENDING or entry.pins:
            raise RuntimeError(f"abort of {key}, which is {entry.state.value} with {entry.pins} pins")
        self._drop(key)

    def evict(self, key: ExpertKey) -> None:
        """RESIDENT -> MISS. Side effect: `policy.on_evict`."""
        entry = self._entry(key, "evict")
        if not entry.evictable:
            raise RuntimeError(f"evict of {key}, which is {entry.state.value} with {entry.pins} pins")
        self._drop(key)

    def pin(self, key: ExpertKey) -> None:
        """Keep a RESIDENT or PENDING expert until as many `unpin` calls as there were `pin` calls."""
        entry = self._entry(key, "pin")
        if entry.evictable:
            self._mark(key, entry, evictable=False)
        entry.pins += 1

    def unpin(self, key: ExpertKey) -> None:
        """Take one pin back."""
        entry = self._entry(key, "unpin")
        if not entry.pins:
            raise RuntimeError(f"unpin of {key}, which has no pin")
        entry.pins -= 1
        if entry.evictable:
            self._mark(key, entry, evictable=True)

    def reset_peak(self) -> None:
        """Measure `peak_bytes` from now on."""
        self.peak_bytes = self.used_bytes

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise RuntimeError naming what is inconsistent; with `idle`, also what is pending or pinned."""
        used = sum(entry.nbytes for entry in self._entries.values())
        evictable = {key for key, entry in self._entries.items() if entry.evictable}
        marked = {ExpertKey(self.layers.start + int(r), int(e)) for r, e in np.argwhere(self._evictable)}
        evictable_bytes = sum(self._entries[key].nbytes for key in evictable)
        problems = []
        if self.used_bytes != used:
            problems.append(f"used_bytes is {self.used_bytes}, its experts have {used}")
        if used > self.capacity_bytes:
            problems.append(f"{used} bytes are used of {self.capacity_bytes}")
        if self.peak_bytes < used:
            problems.append(f"peak_bytes is {self.peak_bytes}, {used} are used")
        if marked != evictable:
            problems.append(f"wrongly marked evictable or not: {sorted(marked ^ evictable)}")
        if self._evictable_bytes != evictable_bytes:
            problems.append(f"{self._evictable_bytes} evictable bytes are counted, there are {evictable_bytes}")
        if idle and (self.pending() or self.pinned()):
            problems.append(f"not idle: pending {self.pending()}, pinned {self.pinned()}")
        if problems:
            raise RuntimeError(f"{self.tier.value} cache: " + "; ".join(problems))

    def _victims(self, missing_bytes: int, protected: Collection[ExpertKey]) -> list[ExpertKey]:
        """The policy's lowest-ranked evictable experts that together have at least `missing_bytes`."""
        victims: list[ExpertKey] = []
        if missing_bytes <= 0:
            return victims
        candidates = self._evictable.copy()
        for layer, expert in protected:
            if layer in self.layers:
                candidates[layer - self.layers.start, expert] = False
        layers = slice(self.layers.start, self.layers.stop)
        for victim in self.policy.eviction_order(candidates, layers):
            victims.append(victim)
            missing_bytes -= self._entries[victim].nbytes
            if missing_bytes <= 0:
                break
        return victims

    def _entry(self, key: ExpertKey, action: str) -> _Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise RuntimeError(f"{action} of {key}, which is {State.MISS.value}")
        return entry

    def _drop(self, key: ExpertKey) -> None:
        entry = self._entries.pop(key)
        if entry.evictable:
            self._mark(key, entry, evictable=False)
        self.used_bytes -= entry.nbytes
        self.policy.on_evict(key)

    def _mark(self, key: ExpertKey, entry: _Entry, *, evictable: bool) -> None:
        self._evictable[key.layer - self.layers.start, key.expert] = evictable
        self._evictable_bytes += entry.nbytes if evictable else -entry.nbytes
