"""One policy on one trace, event by event through the live decision loop, under the simulated clock."""

from __future__ import annotations

from typing import Any

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.quota import Quota, even
from cache.residency import ExpertCache
from cache.traces.trace import Trace
from cache.types import Tier
from offload.costs.model import CostModel
from offload.decide.manager import Manager
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import make_rule
from offload.decide.rules import depth_of
from offload.decide.stacks import Stacks
from offload.simulation.clock import run_timed
from offload.simulation.rows import Setting
from predictors.base import find_predictor, make_predictor


def replay_timed(
    trace: Trace,
    policy: str,
    slots: int,
    host: int,
    setting: Setting,
    profile: Trace | None,
    quota: Quota | None,
    cost: CostModel,
) -> dict[str, Any]:
    """What a row says of one capacity: `slots` where experts are computed, `host` in memory behind an accelerator."""
    nbytes = cost.expert_bytes
    room = {cost.tier: slots} if cost.tier is Tier.CPU else {cost.tier: slots, Tier.CPU: host}
    caches = []
    for tier, total in room.items():
        made = make_policy(policy, _lanes(trace, setting.pool, total), profile)
        caches.append(ExpertCache(tier, (made.lanes.slots * nbytes).tolist(), made))
    prefetcher = None
    if setting.predictor != "none":
        known = profile if find_predictor(setting.predictor).causal else trace
        predictor = make_predictor(setting.predictor, trace.num_layers, trace.num_experts, known)
        rule = make_rule(setting.prefetcher)
        prefetcher = Prefetcher(predictor, depth_of(rule, setting.prefetch_depth, trace.num_layers), rule)
    manager = Manager(Stacks.single(caches, nbytes), prefetcher=prefetcher, quota=quota)
    timeline = run_timed(trace, manager, cost, cold=not setting.warm, warm_up=setting.warm_up)
    stats = timeline.tiers[cost.tier]
    return {
        "accesses": stats.accesses,
        "hits": stats.hits,
        "hit_rate": stats.hit_rate,
        "late_hits": stats.late_hits,
        "misses": stats.misses,
        "bypasses": stats.bypasses,
        "useful_prefetches": stats.useful_prefetches,
        "wasted_prefetches": stats.wasted_prefetches,
        "bytes_moved": stats.bytes_in,
        "stall_s": timeline.stall_s,
        "tokens_per_s": timeline.tokens_per_s,
    }


def _lanes(trace: Trace, pool: str, slots: int) -> Lanes:
    """The lanes of one model: a layer each, evenly, or one for all."""
    layers, experts = trace.num_layers, trace.num_experts
    if pool == "layer":
        return Lanes.per_layer(layers, experts, even(slots, layers, experts))
    return Lanes.shared(layers, experts, slots)
