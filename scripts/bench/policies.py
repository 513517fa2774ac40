"""What a policy costs live: microseconds of its calls in one layer's event, for every causal policy.

    python scripts/bench/policies.py

An event is what the decision loop makes of it: `on_event`, `priorities` once, and the hooks for what goes and comes.
Made-up routing: a quarter of the experts is cached, in a cache for each layer or one for all. Medians over the second
half of the events, the lowest of some repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from cache.lanes import Ints, Lanes
from cache.policy import EvictionPolicy, find_policy, make_policy, names
from cache.residency import ExpertCache
from cache.traces.passes import routing_events
from cache.types import RoutingEvent, Tier
from scripts.bench.common import Args, Arguments, Result, in_turn, show
from scripts.bench.routes import habitual

LAYERS, EXPERTS, TOP_K, TOKENS = 24, 128, 8, 200
SLOTS = EXPERTS // 4
POOLS = {"layer": Lanes.per_layer(LAYERS, EXPERTS, SLOTS), "global": Lanes.shared(LAYERS, EXPERTS, SLOTS * LAYERS)}


def benchmark(args: Args) -> Result:
    """Every policy in both pools."""
    trace, profile = (habitual(LAYERS, EXPERTS, TOP_K, TOKENS, seed) for seed in (0, 1))
    events = list(routing_events(trace))

    def window(name: str, repetition: int) -> Result:
        learnt_from = profile if find_policy(name).learns else None
        return {pool: 1e6 * cost_s(make_policy(name, lanes, learnt_from), events) for pool, lanes in POOLS.items()}

    rows = in_turn(args.policies, args.repetitions, window)
    best = {name: {pool: min(row[pool] for row in own) for pool in POOLS} for name, own in rows.items()}
    show(best, "microseconds an event")
    return {"microseconds_an_event": best}


def cost_s(policy: EvictionPolicy, events: list[RoutingEvent]) -> float:
    """Seconds of one event, the median of the second half."""
    cache = ExpertCache(Tier.CPU, policy.lanes.slots.tolist(), policy)
    hooks_s = 0.0

    def counted(call: Callable[[Ints], None]) -> Callable[[Ints], None]:
        def hook(at: Ints) -> None:
            nonlocal hooks_s
            began = time.perf_counter()
            call(at)
            hooks_s += time.perf_counter() - began

        return hook

    if policy.sees_cache:
        for name in ("on_insert", "on_evict"):
            setattr(policy, name, counted(getattr(policy, name)))
    took = []
    for event in events:
        hooks_s, lane = 0.0, event.layer // policy.lanes.layers
        began = time.perf_counter()
        policy.on_event(event)
        policy.priorities(slice(lane, lane + 1))
        ended = time.perf_counter()
        for key in cache.admit(event.keys, 1).admitted:
            cache.commit(key)
        took.append(ended - began + hooks_s)
    return median(took[len(took) // 2 :])


if __name__ == "__main__":
    arguments = Arguments(__doc__, repetitions=3)
    arguments.option("--policies", [name for name in names() if find_policy(name).causal], "names")
    raise SystemExit(arguments.run(benchmark))
