"""What a policy costs live: microseconds of its calls in one layer's event, for every causal policy.

    python scripts/bench/policies.py

An event is what the decision loop makes of it: `on_event`, `priorities` once, and the hooks for what goes and comes.
Made-up routing: 24 layers, 128 experts, 8 of them an event, a quarter cached, in a cache for each layer or one for all.
Medians over the second half of the events, the lowest of some repetitions. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from cache.lanes import Ints, Lanes
from cache.policy import EvictionPolicy, find_policy, make_policy, names
from cache.residency import ExpertCache
from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import RoutingEvent, Tier
from scripts.bench.common import Arguments, show, turns

LAYERS, EXPERTS, TOP_K, TOKENS = 24, 128, 8, 200


def routing(seed: int) -> Trace:
    """Two sequences in which popular experts, and those used last, come again."""
    rng = np.random.default_rng(seed)
    popularity = -0.8 * np.log(np.argsort(rng.random((LAYERS, EXPERTS)), axis=1) + 1)
    experts = np.empty((TOKENS, LAYERS, TOP_K), np.int64)
    last = np.zeros((LAYERS, EXPERTS))
    for token in experts:
        score = popularity + 1.5 * last + rng.gumbel(size=last.shape)
        token[:] = np.argsort(-score, axis=1)[:, :TOP_K]
        last[:] = 0
        np.put_along_axis(last, token, 1, axis=1)
    weights = -np.sort(-rng.dirichlet(np.ones(TOP_K), (TOKENS, LAYERS)), axis=2)
    return Trace.from_arrays(experts, weights, [0, TOKENS // 2, TOKENS], num_experts=EXPERTS)


def cost_s(policy: EvictionPolicy, cache: ExpertCache, events: list[RoutingEvent]) -> float:
    """Seconds of one event, the median of the second half."""
    hooks_s = 0.0

    def timed(call: Callable[[Ints], None]) -> Callable[[Ints], None]:
        def hook(at: Ints) -> None:
            nonlocal hooks_s
            began = time.perf_counter()
            call(at)
            hooks_s += time.perf_counter() - began

        return hook

    if policy.sees_cache:
        for name in ("on_insert", "on_evict"):
            setattr(policy, name, timed(getattr(policy, name)))
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


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every policy in both pools."""
    slots = EXPERTS // 4
    pools = {"layer": Lanes.per_layer(LAYERS, EXPERTS, slots), "global": Lanes.shared(LAYERS, EXPERTS, slots * LAYERS)}
    events, profile = list(routing_events(routing(0))), routing(1)
    best: dict[str, dict[str, float]] = {name: dict.fromkeys(pools, np.inf) for name in args.policies}
    for _, name in turns(args.policies, args.repetitions):
        for pool, lanes in pools.items():
            policy = make_policy(name, lanes, profile if find_policy(name).learns else None)
            cache = ExpertCache(Tier.CPU, lanes.slots.tolist(), policy)
            best[name][pool] = min(best[name][pool], 1e6 * cost_s(policy, cache, events))
    show(best, "microseconds an event")
    return {"microseconds_an_event": best}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, repetitions=3)
    arguments.names("--policies", [name for name in names() if find_policy(name).causal], "names")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
