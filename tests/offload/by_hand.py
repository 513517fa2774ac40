"""What tests of decisions make by hand: routing events, empty caches, and a prefetcher's sense of time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.types import Phase, RoutingEvent, Tier
from offload.decide.pace import Pace
from offload.decide.prefetch import Prefetcher


def event(
    layer: int, experts: Sequence[int], step: int = 0, weights: Sequence[float] = (), tokens: Sequence[int] = ()
) -> RoutingEvent:
    """A routing event; equal weights and one token each unless said."""
    return RoutingEvent(
        sequence=0,
        step=step,
        layer=layer,
        phase=Phase.DECODE,
        experts=tuple(experts),
        weights=tuple(weights) or (1.0,) * len(experts),
        tokens=tuple(tokens) or (1,) * len(experts),
    )


def cache_of(tier: Tier, slots: int, slot_bytes: int, layers: int, experts: int, policy: str = "lru") -> ExpertCache:
    """An empty cache with room for `slots` experts."""
    return ExpertCache(tier, [slots * slot_bytes], make_policy(policy, Lanes.shared(layers, experts, slots)))


def believes_in_time(prefetcher: Prefetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it take fetching to be as quick as computing, whatever is measured: so that time decides nothing."""
    monkeypatch.setattr(Pace, "update", lambda pace, time: None)
    prefetcher.pace.expert_s = prefetcher.pace.dense_s = dict.fromkeys(Phase, 1.0)
    prefetcher.pace.fetch_s = dict.fromkeys(Tier, 1.2)
