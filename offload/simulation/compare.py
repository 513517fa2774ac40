"""Replays of recorded traces side by side: every policy at every capacity, and how much of what is possible it reaches.

LRU and Belady's offline rules stand beside every comparison: what anybody has, and what nobody can beat. A hit rate
comes from the counting replay (`cache/counting/counting.py`); seconds are the cost model's, from the same counts, or
event by event through the live decision loop (`offload/simulation/clock.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cache.counting.count import Count
from cache.counting.counting import count
from cache.errors import OffloadError
from cache.lanes import Lanes
from cache.policy import find_policy, make_policy, names
from cache.quota import Quota, make_quota
from cache.traces.trace import Trace
from cache.types import Tier
from offload.costs.machine import MachineProfile
from offload.costs.model import CostModel
from offload.costs.stock import find_machine
from offload.decide.prefetchers.base import OURS, make_rule
from offload.decide.rules import depth_of
from offload.simulation.engine import SimulatedEngine
from offload.simulation.rows import BRACKETS, Row, Setting, check_quota, slots_of, with_gaps
from offload.simulation.timed import replay_timed
from offload.system.sizes import parse_bytes


def replay(
    traces: Trace | str | os.PathLike[str] | Sequence[Trace | str | os.PathLike[str]],
    policies: str | Sequence[str] = "lru",
    capacities: str | Sequence[str] = "25%",
    *,
    pool: str = "layer",
    quota: str | None = None,
    warm: bool = False,
    warm_up: int = 0,
    timed: bool = False,
    profile: str | os.PathLike[str] | None = None,
    machine: MachineProfile | str | os.PathLike[str] | None = None,
    expert_bytes: int | str | None = None,
    dense_layer_bytes: int | str | None = None,
    predictor: str = "none",
    prefetcher: str = OURS,
    prefetch_depth: int | None = None,
    device: str = "cpu",
    host_capacity: str = "100%",
    skipped: Callable[[str], object] | None = None,
    progress: Callable[[str], object] | None = None,
) -> list[Row]:
    """Replay recorded `traces` under `policies` at `capacities`: one row each, LRU and Belady beside them.

    `policies` are names as in `make_policy`; "all" is every registered one, of which `skipped` is told those that
    would need a profile. `capacities` are shares of the experts ("25%") or bytes ("4G"). `pool` "layer" gives every
    layer a cache of its own, of the size that `quota` says, "even" by default; "global" is one cache for all. Cold, the
    default, begins every sequence with empty caches and a policy that remembers nothing; `warm` keeps both, and the
    first `warm_up` sequences of a trace are not counted. A quota that changes with what it sees takes a timed replay.
    `machine` is a `MachineProfile`, its file or a stock machine's name: with it rows have seconds. A `timed` replay
    goes event by event through the live decision loop; only it can prefetch what `prefetcher` chooses of what
    `predictor` expects in the next `prefetch_depth` layers, and compute on a `device` "gpu", whose cache has the
    capacity, with `host_capacity` of the experts in memory behind it. `progress` is told what is about to be replayed.
    Raises OffloadError.
    """
    setting = Setting(
        pool=pool,
        quota=quota,
        warm=warm,
        warm_up=warm_up,
        timed=timed or predictor != "none" or device != "cpu",
        profile=None if profile is None else os.fspath(profile),
        machine=machine if isinstance(machine, MachineProfile) or machine is None else find_machine(machine),
        expert_bytes=None if expert_bytes is None else parse_bytes(expert_bytes, "--expert-bytes"),
        dense_layer_bytes=0 if dense_layer_bytes is None else parse_bytes(dense_layer_bytes, "--dense-layer"),
        predictor=predictor,
        prefetcher=prefetcher,
        prefetch_depth=prefetch_depth,
        device=device,
        host_capacity=host_capacity,
    )
    chosen = expand([policies] if isinstance(policies, str) else policies, profile is not None, skipped)
    sizes, rows = [capacities] if isinstance(capacities, str) else list(capacities), []
    for each in [traces] if isinstance(traces, (Trace, str, os.PathLike)) else traces:
        trace = each if isinstance(each, Trace) else Trace.open(each)
        for ahead, policy in rounds(chosen, [predictor]):
            if progress is not None:
                progress(f"{Path(trace.name).name}: {policy}")
            rows += replay_one(trace, policy, sizes, replace(setting, predictor=ahead))
    return with_gaps(rows)


def expand(policies: Sequence[str], has_profile: bool, skipped: Callable[[str], object] | None = None) -> list[str]:
    """The policies meant by a list that may say "all", each once. Raises PolicyError for one that does not exist."""
    chosen: dict[str, None] = {}
    for spec in policies:
        if spec != "all":
            find_policy(spec)
            chosen[spec] = None
            continue
        for name in names():
            if find_policy(name).learns and not has_profile:
                if skipped is not None:
                    skipped(f"{name} is left out: it learns from a recorded trace; name one with --profile")
                continue
            chosen[name] = None
    return list(chosen)


def rounds(policies: Sequence[str], predictors: Sequence[str]) -> list[tuple[str, str]]:
    """What to replay, as (predictor, policy): on demand with the brackets, then with each predictor."""
    on_demand = [*(name for name in BRACKETS if name not in policies), *policies]
    ahead = [name for name in dict.fromkeys(predictors) if name != "none"]
    return [*(("none", name) for name in on_demand), *((one, name) for one in ahead for name in policies)]


def replay_one(trace: Trace, policy: str, capacities: Sequence[str], setting: Setting) -> list[Row]:
    """The rows of one policy, without the gaps. Raises OffloadError."""
    expert_bytes = setting.expert_bytes or trace.expert_bytes
    profile = None if setting.profile is None else Trace.open(setting.profile)
    slots = [slots_of(trace, text, expert_bytes) for text in capacities]
    quota = _quota(trace, setting, profile)
    cls = find_policy(policy)
    made = make_policy(policy, Lanes.shared(trace.num_layers, trace.num_experts), profile)
    depth = depth_of(make_rule(setting.prefetcher), setting.prefetch_depth, trace.num_layers)
    base = Row(
        trace=trace.name,
        policy=cls.name,
        params=asdict(made.params),
        pool=setting.pool,
        quota=(setting.quota or "even") if setting.pool == "layer" else "none",
        warm=setting.warm,
        warm_up=setting.warm_up,
        causal=cls.causal,
        admission="bypass" if made.bypass else "forced",
        profile=None if profile is None or not cls.can_learn else profile.name,
        capacity="",
        capacity_fraction=0.0,
        capacity_slots=0,
        capacity_bytes=None,
        predictor=setting.predictor,
        prefetcher="none" if setting.predictor == "none" else setting.prefetcher,
        prefetch_depth=0 if setting.predictor == "none" else depth,
        device=setting.device,
        accesses=0,
        hits=0,
        hit_rate=0.0,
        late_hits=0,
        misses=0,
        bypasses=0,
        useful_prefetches=0,
        wasted_prefetches=0,
        bytes_moved=None,
        stall_s=None,
        tokens_per_s=None,
    )
    cost = _cost(setting, expert_bytes)
    if setting.timed:
        found = _timed(trace, policy, slots, setting, profile, cost)
    else:
        divided = [[n] if quota is None else quota.slots(n) for n in slots]
        found = _counted(trace, policy, divided, setting, profile, expert_bytes, cost)
    all_experts = trace.num_layers * trace.num_experts
    return [
        replace(
            base,
            capacity=text,
            capacity_fraction=capacity / all_experts,
            capacity_slots=capacity,
            capacity_bytes=None if expert_bytes is None else capacity * expert_bytes,
            **values,
        )
        for text, capacity, values in zip(capacities, slots, found, strict=True)
    ]


def _counted(
    trace: Trace,
    policy: str,
    slots: Sequence[Sequence[int]],
    setting: Setting,
    profile: Trace | None,
    expert_bytes: int | None,
    cost: CostModel | None,
) -> list[dict[str, Any]]:
    """What a row says of each capacity, by counting; seconds where the costs are known."""
    counts = count(
        trace,
        policy,
        slots,
        pool=setting.pool,
        cold=not setting.warm,
        warm_up=setting.warm_up,
        profile=profile,
        kinds=cost is not None,
    )
    found: list[dict[str, Any]] = []
    for counted in counts:
        stall_s, tokens_per_s = (None, None) if cost is None else _seconds(counted, trace, cost)
        found.append(
            {
                "accesses": counted.accesses,
                "hits": counted.hits,
                "hit_rate": counted.hit_rate,
                "misses": counted.misses,
                "bypasses": counted.bypasses,
                "bytes_moved": None if expert_bytes is None else (counted.misses + counted.exchanges) * expert_bytes,
                "stall_s": stall_s,
                "tokens_per_s": tokens_per_s,
            }
        )
    return found


def _timed(
    trace: Trace, policy: str, slots: Sequence[int], setting: Setting, profile: Trace | None, cost: CostModel | None
) -> list[dict[str, Any]]:
    """The same, under the simulated clock."""
    if cost is None:
        raise OffloadError("a timed replay needs a machine and an expert's size: give --machine and --expert-bytes")
    host = slots_of(trace, setting.host_capacity, cost.expert_bytes, flag="--host-capacity")
    shares = [None if setting.quota is None else _quota(trace, setting, profile) for _ in slots]  # each learns
    return [
        replay_timed(trace, policy, n, host, setting, profile, quota, cost)
        for n, quota in zip(slots, shares, strict=True)
    ]


def _quota(trace: Trace, setting: Setting, profile: Trace | None) -> Quota | None:
    """How layers share; None where all have one cache. Raises PolicyError for a quota that learns as it goes, where
    nothing would be learnt."""
    if setting.pool == "global":
        return None
    quota = make_quota(setting.quota or "even", trace.num_layers, trace.num_experts, profile)
    check_quota(quota, setting)
    return quota


def _seconds(counted: Count, trace: Trace, cost: CostModel) -> tuple[float, float]:
    """(stall seconds of all, tokens/s of decoding, or of prompts where nothing was decoded)."""
    engine = SimulatedEngine(cost, Tier.CPU)
    tokens, seconds, stall = {True: 0, False: 0}, {True: 0.0, False: 0.0}, 0.0
    layers = trace.num_layers
    for kind, times in counted.events.items():
        took_s, stalled_s = engine.event_s(kind.tokens, trace.top_k, kind.hits, kind.misses)
        # A pass's tokens and its own overhead are spread over its layers.
        tokens[kind.decode] += kind.tokens * times
        seconds[kind.decode] += times * (took_s + cost.pass_s() / layers)
        stall += times * stalled_s
    decode = tokens[True] > 0
    return stall, tokens[decode] / layers / seconds[decode] if seconds[decode] else 0.0


def _cost(setting: Setting, expert_bytes: int | None) -> CostModel | None:
    if setting.machine is None or expert_bytes is None:
        return None
    return CostModel(
        setting.machine,
        expert_bytes=expert_bytes,
        format=setting.format,
        tier=Tier.GPU if setting.device == "gpu" else Tier.CPU,
        dense_layer_bytes=setting.dense_layer_bytes,
        dense_pass_bytes=setting.dense_pass_bytes,
    )
