"""Where the experts of a layer's event are: in the cache that computes, in host memory, or on disk. Torch-free.

Counted in a recorded trace by the live decision loop, or estimated from what one real model's routing is like.
A hit rate alone would not do: an event waits for all of its experts, so it matters how misses come together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from math import comb
from typing import NamedTuple

import numpy as np

from cache.errors import TraceError
from cache.residency import ExpertCache
from cache.traces.passes import routing_events
from cache.traces.trace import DECODE, PREFILL, Trace
from cache.types import Phase, Tier
from offload.costs.model import CostModel
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.rules import Rules
from offload.decide.stacks import Stacks
from offload.plan.budgets import Plan
from offload.plan.work import Work

# Of the experts that a decoded token needs, how many a cache holds, by the share of all experts it has room for: policy
# lfru, one cache for all layers. From a recorded trace of gpt-oss-20b (24 layers, top-4 of 32) answering questions of
# MMLU, derived from AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting; scripts/bench/typical_locality.py makes the tables.
TYPICAL_SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TYPICAL_DECODE = (0.0, 0.069, 0.254, 0.408, 0.536, 0.717, 0.841, 0.916, 0.961, 0.984, 0.995, 0.999, 1.0)
# The same of the experts that a prompt of 128 tokens needs, after other prompts and answers.
TYPICAL_PREFILL = (0.0, 0.021, 0.059, 0.105, 0.155, 0.268, 0.393, 0.512, 0.636, 0.753, 0.864, 0.95, 1.0)


class EventKind(NamedTuple):
    """An event of so many `tokens`: experts that are where they compute, are copied from host memory, or read."""

    tokens: int
    hits: int
    copies: int
    reads: int


Mix = Mapping[EventKind, float]
"""How often a layer's event is of each kind; sums to 1."""


@dataclass(frozen=True)
class RoutingMix:
    """The events of decoding, and of each pass of a prompt."""

    decode: Mix
    prefill: Sequence[Mix]
    source: str
    """"typical", or the trace's name."""


def hit_rate(mix: Mix) -> float:
    """Of the tier that computes."""
    return _mean(mix, lambda kind: kind.hits) / (_mean(mix, lambda kind: kind.hits + kind.copies + kind.reads) or 1.0)


def host_hit_rate(mix: Mix) -> float | None:
    """Of what the tier that computes lacks, the share found in host memory; None where nothing is lacking."""
    copies, reads = _mean(mix, lambda kind: kind.copies), _mean(mix, lambda kind: kind.reads)
    return copies / (copies + reads) if copies + reads else None


def chunks(plan: Plan, prompt_tokens: int) -> list[int]:
    """The tokens of each pass that reads a prompt."""
    full, rest = divmod(prompt_tokens, plan.chunk)
    return [plan.chunk] * full + [rest] * (rest > 0)


def typical(plan: Plan, work: Work, prompt_tokens: int) -> RoutingMix:
    """What to expect of a model that nothing was recorded of.

    A prompt's tokens are taken to choose independently and evenly, so that n of them need 1 - (1 - K/E)^n of a layer's
    experts: more than they really do.
    """
    shares = [plan.slots(tier) / plan.experts for tier in _tiers(plan)]

    def mix(tokens: int, experts: int, curve: Sequence[float]) -> Mix:
        near = float(np.interp(shares[0], TYPICAL_SHARES, curve))
        # A slower tier sees the same uses, and holds what the faster one does and the next best.
        either = float(np.interp(max(shares), TYPICAL_SHARES, curve))
        return _spread(tokens, experts, near, either - near)

    prefill = []
    for tokens in chunks(plan, prompt_tokens):
        union = work.experts_per_layer * (1 - (1 - work.top_k / work.experts_per_layer) ** tokens)
        prefill.append(mix(tokens, max(round(union), work.top_k), TYPICAL_PREFILL))
    return RoutingMix(mix(1, work.top_k, TYPICAL_DECODE), prefill, "typical")


def counted(
    plan: Plan, work: Work, trace: Trace, rules: Rules, *, prompt_tokens: int, tokens: int, generations: int
) -> RoutingMix:
    """What `trace` makes of the plan's caches without fetching ahead: as many generations as are asked for, after one
    that warms them up. Each reads a prompt and decodes `tokens` - 1 more. Raises PolicyError and TraceError."""
    prompt = chunks(plan, prompt_tokens)
    routed = as_run(plan, work, trace, prompt_tokens=prompt_tokens, tokens=tokens, generations=generations)
    manager = manager_of(plan, trace, rules)
    manager.prefetcher = None
    decode: Counter[EventKind] = Counter()
    prefill: list[Counter[EventKind]] = [Counter() for _ in prompt]
    for event in routing_events(routed):
        layer_plan = manager.step(event)
        if layer_plan.error is not None:
            raise layer_plan.error
        fetches = [*layer_plan.fetches, *layer_plan.late_fetches]
        for fetch in fetches:
            manager.arrived(fetch, 0)
        manager.finish()
        if event.sequence:  # not the first generation
            copies = sum(fetch.source is not Tier.DISK for fetch in fetches)
            event_tokens = sum(event.tokens) // trace.top_k
            kind = EventKind(event_tokens, len(layer_plan.resident), copies, len(fetches) - copies)
            (prefill[event.step] if event.phase is Phase.PREFILL else decode)[kind] += 1
    return RoutingMix(_shares(decode), [_shares(each) for each in prefill], trace.name)


def manager_of(plan: Plan, trace: Trace, rules: Rules, cost: CostModel | None = None) -> Manager:
    """The decision loop that a model of one precision under this plan has, empty; a scheduler goes by `cost`, without
    which one tier computes everything."""
    shape = plan.layers, trace.num_experts
    policies = {tier: rules.make_policy(*shape, plan.slots(tier)) for tier in _tiers(plan)}
    nbytes = plan.slot_bytes
    caches = [ExpertCache(tier, [nbytes * n for n in p.lanes.slots.tolist()], p) for tier, p in policies.items()]
    split = None
    if cost is not None and plan.computing_tier is Tier.GPU:
        split = rules.make_split(SplitCosts.modelled(cost))
    return Manager(
        Stacks.single(caches, nbytes),
        prefetcher=rules.make_prefetcher(*shape),
        prefill=rules.make_prefill(*shape),
        split=split,
        quota=rules.make_quota(*shape),
    )


def as_run(plan: Plan, work: Work, trace: Trace, *, prompt_tokens: int, tokens: int, generations: int) -> Trace:
    """The routing of a run that follows `trace`: so many generations, after one more that warms the caches up.

    Raises TraceError for a trace of another shape than the model.
    """
    wanted = plan.layers
    if trace.num_layers < wanted or trace.num_experts != work.experts_per_layer or trace.top_k != work.top_k:
        raise TraceError(
            f"{trace.name} has {trace.num_layers} layers, top-{trace.top_k} of {trace.num_experts} experts, the model "
            f"{wanted} layers, top-{work.top_k} of {work.experts_per_layer}: record one with this model's shape"
        )
    prompt = chunks(plan, prompt_tokens)
    passes = [*prompt, *[1] * (tokens - 1)]
    rows = generation_rows(trace, 1 + generations, sum(passes))
    step = np.repeat(np.arange(len(passes)), passes)
    phase = np.where(step < len(prompt), PREFILL, DECODE)
    return Trace.from_arrays(
        trace.experts[rows][:, :wanted],
        trace.weights[rows][:, :wanted],
        np.arange(2 + generations) * sum(passes),
        num_experts=trace.num_experts,
        step=np.tile(step, 1 + generations),
        phase=np.tile(phase, 1 + generations),
        name=trace.name,
        metadata={
            "expert_bytes": str(plan.slot_bytes),
            "dtype": plan.dtype,
            **({} if work.precision is None else {"precision": work.precision}),
        },
    )


def generation_rows(trace: Trace, generations: int, tokens: int) -> list[int]:
    """The trace's rows that so many generations of `tokens` follow one after the other under a `TraceRouter`: each
    begins with the next sequence, and takes another one where that ends."""
    offsets = trace.sequence_offsets.tolist()
    sequences = cycle(pairwise(offsets))
    rows: list[int] = []
    for _ in range(generations):
        rows += islice((row for start, end in sequences for row in range(start, end)), tokens)
    return rows


def _tiers(plan: Plan) -> list[Tier]:
    return [Tier.CPU] if plan.computing_tier is Tier.CPU else [Tier.GPU, Tier.CPU]


def _spread(tokens: int, experts: int, hit: float, copied: float) -> dict[EventKind, float]:
    """The mix if each expert's place were drawn by itself."""
    if experts > _DRAWN_EXPERTS:  # of many, the shares are near enough
        hits, copies = round(experts * hit), round(experts * (hit + copied)) - round(experts * hit)
        return {EventKind(tokens, hits, copies, experts - hits - copies): 1.0}
    return {
        EventKind(tokens, hits, copies, experts - hits - copies): comb(experts, hits)
        * comb(experts - hits, copies)
        * hit**hits
        * copied**copies
        * max(1 - hit - copied, 0.0) ** (experts - hits - copies)
        for hits in range(experts + 1)
        for copies in range(experts - hits + 1)
    }


_DRAWN_EXPERTS = 16


def _shares(counts: Counter[EventKind]) -> dict[EventKind, float]:
    return {kind: times / counts.total() for kind, times in counts.items()}


def _mean(mix: Mix, value: Callable[[EventKind], int]) -> float:
    return float(sum(share * value(kind) for kind, share in mix.items()))
