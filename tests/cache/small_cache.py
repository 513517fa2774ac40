"""A small cache, and how to fill it."""

from __future__ import annotations

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.types import ExpertKey, Phase, RoutingEvent, Tier

LAYERS, EXPERTS = 3, 4
A, B, C, D = (ExpertKey(0, expert) for expert in range(4))
SHARED = Lanes.shared(LAYERS, EXPERTS)


def make_cache(*capacities: int, policy: str = "lru") -> ExpertCache:
    """One pool of so many bytes, or one for each layer."""
    lanes = SHARED if len(capacities) == 1 else Lanes.per_layer(LAYERS, EXPERTS)
    return ExpertCache(Tier.CPU, capacities, make_policy(policy, lanes))


def use(cache: ExpertCache, *keys: ExpertKey, step: int = 0) -> None:
    """Tell the policy that `keys`, all of one layer, were used, the last one most recently."""
    n = len(keys)
    experts = tuple(key.expert for key in keys)
    cache.policy.on_event(RoutingEvent(0, step, keys[0].layer, Phase.DECODE, experts, (0.5,) * n, (1,) * n))


def fill(cache: ExpertCache, *keys: ExpertKey, nbytes: int = 10) -> None:
    """Make `keys` resident and used, in order."""
    for key in keys:
        assert cache.reserve(key, nbytes) == []
        cache.commit(key)
    use(cache, *keys)
