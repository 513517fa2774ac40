"""What a counting replay says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


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
    exchanges: int = 0
    """Experts that the policy brought in by itself; they count as there from the next event of their layer on."""
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
