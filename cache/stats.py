"""Every counter, defined once. The manager counts; live and replayed runs use the same words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TierStats:
    """What happened at one tier's cache.

    An access is one expert of one layer's routing event, looked up against the state before the event. It is
    exactly one of hit, late hit and miss. Bypasses are a subset of the misses.

    At the tier that computes an access is an expert, at its target precision. A slower tier is asked for what is still
    missing, slice by slice: where a precision has several slices, as in "int8>int4", an access there is a slice.
    """

    hits: int = 0
    """Accesses to an expert that was resident before the event."""

    late_hits: int = 0
    """Accesses to an expert that was pending before the event: reserved, its bytes on their way."""

    misses: int = 0
    """Accesses to an expert that was neither before the event; the first use ever is one."""

    bypasses: int = 0
    """The misses whose expert was streamed past the cache: evicting all that may go made no room."""

    on_cpu: int = 0
    """Accesses, most of them misses, whose expert the CPU computed beside this tier's accelerator."""

    evictions: int = 0
    """Resident experts whose bytes were given up to make room for another one."""

    prefetches: int = 0
    """Experts whose way into this tier was begun before an event asked for them."""

    useful_prefetches: int = 0
    """Prefetches whose expert was used before it was evicted, late hits among them."""

    wasted_prefetches: int = 0
    """Prefetches whose expert was evicted before it was used."""

    cancelled_prefetches: int = 0
    """Prefetches taken back before a byte had moved."""

    bytes_in: int = 0
    """Bytes moved into this tier, bypasses included; an aborted transfer counts what it moved."""

    @property
    def accesses(self) -> int:
        """Hits, late hits and misses together."""
        return self.hits + self.late_hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits / accesses, late hits not being hits; 0.0 before the first access."""
        return self.hits / self.accesses if self.accesses else 0.0
