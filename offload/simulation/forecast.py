"""How fast a plan will run and what it will take, before a weight is read. Torch-free.

A forward pass is what the simulated clock makes of its layers' events, at the costs that this machine was measured to
have. What is left out: attention over a long context, fallbacks that choose among precisions, and layers that CPU and
accelerator divide between them. Without a trace nothing is taken to be fetched ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cache.errors import ProfileError
from cache.residency import State
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent, Tier
from offload.costs.machine import MachineProfile
from offload.costs.model import CostModel
from offload.decide.fallbacks.base import find_fallback
from offload.decide.placements.base import EMPTY
from offload.decide.plan import LayerPlan
from offload.decide.preset import Preset
from offload.decide.rules import Rules
from offload.plan.budgets import Plan
from offload.plan.work import Work, computing_threads
from offload.simulation.clock import PhaseTime, run_timed
from offload.simulation.engine import SimulatedEngine
from offload.simulation.mix import Mix, RoutingMix, as_run, hit_rate, host_hit_rate, manager_of, typical

_SAME_LINK = 0.01  # stated speeds of emulated links that differ by less are one


@dataclass(frozen=True)
class Speeds:
    """What a run is judged by; peaks are the process's and the accelerator's. None: not measured, or none there."""

    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    time_to_first_token_s: float | None = None
    hit_rate: float | None = None
    """Of decoding, at the tier that computes."""
    host_hit_rate: float | None = None
    """Of what that tier lacked, what was in host memory; None without an accelerator."""
    peak_rss_bytes: int | None = None
    peak_gpu_bytes: int | None = None


def predicted_beside(predicted: Speeds | None, actual: Speeds | None) -> dict[str, Any]:
    """Both as JSON: `decode_tokens_per_s` is measured, `predicted_decode_tokens_per_s` was predicted, and so on."""
    said = {f"predicted_{name}": value for name, value in asdict(predicted or Speeds()).items()}
    return {**said, **asdict(actual or Speeds())}


def forecast(
    plan: Plan,
    profile: MachineProfile | None,
    *,
    prompt_tokens: int,
    tokens: int = 64,
    generations: int = 3,
    trace: Trace | None = None,
    rules: Rules | None = None,
    threads: int | None = None,
) -> tuple[Speeds, str | None]:
    """What to expect of the plan; or its peaks of memory alone, and why there is nothing to predict speeds by.

    By a `trace` a run that follows it is replayed by `rules`; else a typical model's locality is taken. Raises
    PolicyError and TraceError.
    """
    try:
        if profile is None:
            raise ProfileError("this machine has not been measured: measure it with: offload profile")
        cost = costs(plan, profile, threads)
        if trace is None:
            return predict(plan, cost, typical(plan, work_of(plan), prompt_tokens)), None
        rules = rules or Rules().settled()
        length = {"prompt_tokens": prompt_tokens, "tokens": tokens, "generations": generations}
        return replayed(plan, cost, trace, rules, **length), None
    except ProfileError as error:
        return Speeds(**peaks(plan)), str(error)


def rules_to_replay(chosen: Preset, trace: Trace | None) -> tuple[Rules | None, str | None]:
    """What `forecast` can go by of the parts that are `chosen`, before anything is learnt: their rules, None for the
    default; and what to say of those that make no difference to it."""
    if trace is None:
        return None, "speeds are of a typical locality, whatever its policy, quota and predictor: a --trace counts them"
    if chosen.learns:
        return None, f"its {' and '.join(chosen.learns)} learn from a profile, so speeds are of the default policy"
    lossy = find_fallback(chosen.fallback).lossy
    rules = Rules.of(chosen, None).settled(lossy=lossy)  # a run that follows a trace has no record of gates
    if chosen.placement != EMPTY:
        return rules, "what it has in memory at the start makes no difference to speeds, which are of a model in use"
    return rules, None


def work_of(plan: Plan) -> Work:
    """What the plan's passes read and compute. Raises ProfileError, saying why, where that cannot be priced."""
    if plan.work is None:
        raise ProfileError("it is not known how many experts a token of this model goes to")
    if plan.work.precision is None:
        raise ProfileError("a fallback chooses among several precisions as it runs")
    return plan.work


def check_profile(profile: MachineProfile, plan: Plan) -> None:
    """Raises ProfileError, with the command that measures it, where the plan's device is not the one in the profile."""
    if plan.computing_tier is Tier.CPU:
        return
    device = plan.device.partition(":")[0]
    asked, stated = plan.link_bytes_per_s, profile.link_stated_bytes_per_s
    command = f"measure it with: offload profile --device {device}"
    if asked is not None:
        command += f" --link {asked / 1e9:g}GB/s"
    measured = profile.compute.get(Tier.GPU)
    if profile.estimated is not None:  # another machine, whatever accelerator this one has or emulates
        if measured is None:
            raise ProfileError(f"{profile.about['machine']}, has no accelerator: name another one, or --device cpu")
        return
    if measured is None or measured.device.partition(":")[0] != device:
        raise ProfileError(f"this machine's profile has no {device} device: {command}")
    if asked is not None and (stated is None or abs(stated / asked - 1) > _SAME_LINK):
        raise ProfileError(
            f"this machine's profile is of a link of {(stated or 0) / 1e9:g} GB/s, not {asked / 1e9:g} GB/s: {command}"
        )


def costs(plan: Plan, profile: MachineProfile, threads: int | None = None) -> CostModel:
    """What the plan's model costs on that machine, with so many `threads` on the CPU (default: the runtime's choice).

    Raises ProfileError for what was not measured.
    """
    work = work_of(plan)
    check_profile(profile, plan)
    return CostModel(
        profile,
        expert_bytes=plan.slot_bytes,
        record_bytes=work.record_bytes,
        format=work.precision or "",
        dense_format=work.dense_precision,
        tier=plan.computing_tier,
        dense_layer_bytes=work.dense_layer_bytes,
        dense_pass_bytes=work.dense_pass_bytes,
        packs=work.packs,
        threads=threads or computing_threads(plan.device, plan.slot_bytes),
    )


def predict(plan: Plan, cost: CostModel, mix: RoutingMix) -> Speeds:
    """What to expect of the plan at these costs, when its experts are found where `mix` says."""
    work = work_of(plan)
    engine = SimulatedEngine(cost, plan.computing_tier)

    def pass_s(events: Mix) -> float:
        event_s = sum(
            share * engine.event_s(kind.tokens, work.top_k, kind.hits, kind.copies + kind.reads, kind.copies)[0]
            for kind, share in events.items()
        )
        return cost.pass_s() + plan.layers * event_s

    decode_s = pass_s(mix.decode) if mix.decode else None
    prompt_s = sum(pass_s(events) for events in mix.prefill)
    prompt_tokens = sum(next(iter(events)).tokens for events in mix.prefill)
    return Speeds(
        decode_tokens_per_s=1 / decode_s if decode_s else None,
        prefill_tokens_per_s=prompt_tokens / prompt_s if prompt_s else None,
        time_to_first_token_s=prompt_s or None,
        hit_rate=hit_rate(mix.decode) if mix.decode else None,
        host_hit_rate=host_hit_rate(mix.decode) if plan.computing_tier is Tier.GPU else None,
        **peaks(plan),
    )


def replayed(
    plan: Plan, cost: CostModel, trace: Trace, rules: Rules, *, prompt_tokens: int, tokens: int, generations: int
) -> Speeds:
    """What to expect of a run that follows `trace`: so many generations, after one that warms the caches up, through
    the live decision loop by a simulated clock. Raises PolicyError and TraceError."""
    work = work_of(plan)
    found = dict.fromkeys(("hits", "copies", "reads", "accesses"), 0)
    manager = manager_of(plan, trace, rules, cost)

    def each(event: RoutingEvent, layer_plan: LayerPlan) -> None:
        if event.sequence and event.phase is Phase.DECODE:  # the first one warms up
            fetches = [*layer_plan.fetches, *layer_plan.late_fetches]
            reads = sum(fetch.source is Tier.DISK for fetch in fetches)
            held = sum(manager.caches[0].state(key) is State.RESIDENT for key in layer_plan.in_place())
            found["hits"] += len(layer_plan.resident) + held
            found["copies"] += len(fetches) - reads + len(layer_plan.in_place()) - held
            found["reads"] += reads
            found["accesses"] += len(event.experts)

    def run(generations: int) -> dict[Phase, PhaseTime]:
        nonlocal manager
        manager = manager_of(plan, trace, rules, cost)
        routed = as_run(plan, work, trace, prompt_tokens=prompt_tokens, tokens=tokens, generations=generations)
        return run_timed(routed, manager, cost, cold=False, each=each).phases

    whole, before = run(generations), run(0)
    seconds = {phase: whole[phase].seconds - before[phase].seconds for phase in Phase}
    counted = {phase: whole[phase].tokens - before[phase].tokens for phase in Phase}
    missed = found["copies"] + found["reads"]
    return Speeds(
        decode_tokens_per_s=counted[Phase.DECODE] / seconds[Phase.DECODE] if seconds[Phase.DECODE] else None,
        prefill_tokens_per_s=counted[Phase.PREFILL] / seconds[Phase.PREFILL],
        time_to_first_token_s=seconds[Phase.PREFILL] / generations,
        hit_rate=found["hits"] / found["accesses"] if found["accesses"] else None,
        host_hit_rate=(found["copies"] / missed if missed else 1.0) if plan.computing_tier is Tier.GPU else None,
        **peaks(plan),
    )


def peaks(plan: Plan) -> dict[str, int | None]:
    """The memory that a plan sets aside: `peak_rss_bytes` and `peak_gpu_bytes`."""
    sums: Mapping[Tier, int] = {
        tier: sum(item.nbytes for item in plan.items if item.tier is tier) for tier in (Tier.CPU, Tier.GPU)
    }
    if plan.gpu_mem_bytes is None:
        return {"peak_rss_bytes": sums[Tier.CPU], "peak_gpu_bytes": None}
    # The emulated accelerator's memory is the host's.
    in_process = sums[Tier.GPU] if plan.device == "emulated" else 0
    return {"peak_rss_bytes": sums[Tier.CPU] + in_process, "peak_gpu_bytes": sums[Tier.GPU]}
