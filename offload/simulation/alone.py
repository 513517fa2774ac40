"""One event with idle channels before and after it, timed in one go: what most events of a replay are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache.types import Tier
from offload.costs.model import CostModel


@dataclass(slots=True)
class EventTime:
    """Where the seconds of one event went, its layer's dense part not included."""

    seconds: float
    stall_s: float
    compute_s: float
    read_s: float
    """The disk was busy."""
    copied_s: float
    """The link was busy."""
    reads: int
    """Experts read from disk."""
    copies: int
    """Experts that crossed the link."""
    landed: list[int]
    """Indices of the fetches, in the order in which they landed."""


def time_event(
    cost: CostModel,
    compute: CostModel,
    computing: Tier,
    residents: Sequence[int],
    sources: Sequence[Tier],
    fetched: Sequence[int],
    early: int,
) -> EventTime:
    """An event whose experts are all computed on the tier `computing`: `residents`, and whole experts `fetched` from
    `sources`. All but the first `early` fetches start when the residents have been computed. Numbers are tokens an
    expert. `compute` says what computing takes."""
    disk_s = read_s = 0.0
    on_host: list[tuple[float, int]] = []  # (when, fetch)

    def read(sources: Sequence[Tier], first: int, start_s: float) -> None:
        nonlocal disk_s, read_s
        for index, source in enumerate(sources, first):
            if source is not Tier.DISK:
                on_host.append((start_s, index))
                continue
            took_s = cost.read_s(cost.record_bytes, alone=disk_s <= start_s, computing=bool(residents))
            disk_s = max(disk_s, start_s) + took_s
            read_s += took_s
            on_host.append((disk_s, index))

    read(sources[:early], 0, 0.0)
    now_s = compute_s = stall_s = copied_s = 0.0
    for tokens in residents:
        took_s = compute.expert_s(computing, tokens, reading=now_s < disk_s)
        now_s += took_s
        compute_s += took_s
    read(sources[early:], early, now_s)
    on_host.sort()
    landings = on_host
    if computing is not Tier.CPU:
        landings, link_s = [], 0.0
        for ready_s, index in on_host:
            took_s = cost.link_s(cost.expert_bytes)
            link_s = max(link_s, ready_s) + took_s
            copied_s += took_s
            landings.append((link_s, index))
    for landed_s, index in landings:
        if landed_s > now_s:
            stall_s += landed_s - now_s
            now_s = landed_s
        took_s = compute.expert_s(computing, fetched[index], reading=now_s < disk_s)
        now_s += took_s
        compute_s += took_s
    reads = sum(source is Tier.DISK for source in sources)
    copies = 0 if computing is Tier.CPU else len(sources)
    landed = [index for _, index in landings]
    return EventTime(now_s, stall_s, compute_s, read_s, copied_s, reads, copies, landed)
