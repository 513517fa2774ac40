"""What one tier holds, expert by expert and byte by byte; `cache/residency.py` decides what that is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from cache.candidates import Candidates
from cache.policy import EvictionPolicy
from cache.types import ExpertKey, Tier


class State(Enum):
    """Where an expert stands at one tier."""

    MISS = "miss"
    PENDING = "pending"
    RESIDENT = "resident"


@dataclass(slots=True)
class Entry:
    """An expert that has a place."""

    key: ExpertKey
    index: int
    """Of the expert among all of the model's."""
    lane: int
    nbytes: int
    state: State = State.PENDING
    pins: int = 0
    evictable: bool = False
    """RESIDENT and without a pin; `Holdings._mark` keeps it."""


class Holdings:
    """The experts that have a place at one tier.

    `capacities` are the bytes of each of the policy's lanes. The policy is told of every expert that gets a place or
    loses it.
    """

    def __init__(self, tier: Tier, capacities: Sequence[int], policy: EvictionPolicy) -> None:
        lanes = policy.lanes
        if len(capacities) != lanes.count or min(capacities) < 0:
            raise ValueError(f"a cache of {capacities} bytes for {lanes.count} lanes")
        self.tier = tier
        self.policy = policy
        self.capacities = list(capacities)
        """Bytes of each lane."""
        self.peak_bytes = 0
        """The most that all lanes together have used, since the start or `reset_peak`."""
        self._width = lanes.width
        self._experts = lanes.experts
        self._hold_nothing()

    def _hold_nothing(self) -> None:
        self.used = [0] * self.policy.lanes.count
        """Bytes of RESIDENT and PENDING experts together, of each lane."""
        self._used_bytes = 0
        self._entries: dict[ExpertKey, Entry] = {}
        self._candidates = Candidates(self.policy)

    @property
    def capacity_bytes(self) -> int:
        """Of all lanes together."""
        return sum(self.capacities)

    def lane_of(self, layer: int) -> int:
        """Which lane has the layer's experts."""
        return layer * self._experts // self._width

    def free_bytes(self, layer: int) -> int:
        """Bytes of the layer's lane that nothing uses."""
        lane = self.lane_of(layer)
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
        kept = (self._entries.get(key) for key in {*protected, *self._candidates.in_use})
        return sum(self._candidates.marked_bytes) - sum(entry.nbytes for entry in kept if entry and entry.evictable)

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
            marked, marked_bytes = self._candidates.marked(lane), self._candidates.marked_bytes[lane]
            evictable_bytes = sum(entry.nbytes for entry in entries if entry.evictable)
            where = f"lane {lane}: " if len(self.capacities) > 1 else ""
            if self.used[lane] != used:
                problems.append(f"{where}used_bytes is {self.used[lane]}, its experts have {used}")
            if used > capacity:
                problems.append(f"{where}{used} bytes are used of {capacity}")
            if marked != evictable:
                problems.append(f"{where}wrongly marked evictable or not: {sorted(marked ^ evictable)}")
            if marked_bytes != evictable_bytes:
                problems.append(f"{where}{marked_bytes} evictable bytes are counted, there are {evictable_bytes}")
        if self._used_bytes != sum(self.used):
            problems.append(f"used_bytes is {self._used_bytes}, its lanes have {sum(self.used)}")
        if self.peak_bytes < self._used_bytes:
            problems.append(f"peak_bytes is {self.peak_bytes}, {self._used_bytes} are used")
        in_use = list(self._candidates.in_use)
        if idle and (self.pending() or self.pinned() or in_use):
            problems.append(f"not idle: pending {self.pending()}, pinned {self.pinned()}, in use {in_use}")
        if problems:
            raise RuntimeError(f"{self.tier.value} cache: " + "; ".join(problems))

    def _entry(self, key: ExpertKey, action: str) -> Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise RuntimeError(f"{action} of {key}, which is {State.MISS.value}")
        return entry

    def _add(self, key: ExpertKey, nbytes: int) -> None:
        index = key.layer * self._experts + key.expert
        lane = index // self._width
        self._entries[key] = Entry(key, index, lane, nbytes)
        self.used[lane] += nbytes
        self._used_bytes += nbytes
        if self._used_bytes > self.peak_bytes:
            self.peak_bytes = self._used_bytes
        if self.policy.sees_cache:
            self.policy.on_insert(np.array([index]))

    def _drop(self, entry: Entry) -> None:
        if entry.evictable:
            self._mark(entry, False)
        del self._entries[entry.key]
        self.used[entry.lane] -= entry.nbytes
        self._used_bytes -= entry.nbytes
        if self.policy.sees_cache:
            self.policy.on_evict(np.array([entry.index]))

    def _mark(self, entry: Entry, evictable: bool) -> None:
        entry.evictable = evictable
        self._candidates.mark(entry.index, entry.nbytes, evictable)
