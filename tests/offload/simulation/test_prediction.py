"""A prediction is the simulated clock's answer for what a plan's caches are asked for."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from machines import MB, machine

from cache.errors import ProfileError, TraceError
from cache.traces.trace import Trace
from cache.types import Tier
from offload.costs.machine import MachineProfile
from offload.costs.model import CostModel
from offload.decide.rules import Rules
from offload.plan.budgets import Budgets, Plan, place
from offload.plan.needs import Needs, SliceNeeds
from offload.plan.work import Work, computing_threads
from offload.simulation.engine import SimulatedEngine
from offload.simulation.forecast import Speeds, check_profile, costs, forecast, peaks, predict, predicted_beside
from offload.simulation.mix import (
    EventKind,
    RoutingMix,
    chunks,
    counted,
    generation_rows,
    hit_rate,
    host_hit_rate,
    typical,
)

WORK = Work(
    experts_per_layer=8,
    top_k=2,
    precision="bf16",
    dense_precision="bf16",
    record_bytes=10 * MB,
    dense_layer_bytes=5 * MB,
    dense_pass_bytes=10 * MB,
)
LAYERS = 4


def plan_of(slots: int, gpu_slots: int | None = None, work: Work | None = WORK, device: str = "emulated") -> Plan:
    """4 layers of 8 experts of 10 MB, so many of them cached, on the CPU or an accelerator; 16 tokens a pass."""
    size = 10 * MB
    needs = Needs(
        model="model",
        context=512,
        max_context=None,
        dense_bytes=MB,
        kv_bytes=MB,
        workspace_bytes={16: MB},
        layers=LAYERS,
        experts=8 * LAYERS,
        slices=(SliceNeeds("bf16", size),),
        expert_bytes=8 * LAYERS * size,
        reader_bytes=0,
        readers=1,
        places=1,
        process_bytes=MB,
        work=work,
    )
    room = 200 * MB
    if gpu_slots is None:
        return place(needs, Budgets(room + slots * size, expert_cache=slots * size), device="cpu", dtype="bfloat16")
    plan = place(
        needs,
        Budgets(4 * MB + 96 * 2**20 + size + slots * size, room + gpu_slots * size, gpu_slots * size),
        device=device,
        dtype="bfloat16",
    )
    return replace(plan, link_bytes_per_s=2e9 if device == "emulated" else None)


def trace_of(tokens: int = 64, experts: int = 8, layers: int = LAYERS, sequences: int = 4, top_k: int = 2) -> Trace:
    """Random routing, the same every time."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((tokens, layers, experts)), axis=2)[..., :top_k]
    offsets = np.linspace(0, tokens, sequences + 1).astype(int)
    weights = np.sort(rng.random((tokens, layers, top_k)))[..., ::-1]
    return Trace.from_arrays(chosen, weights, offsets, num_experts=experts)


def test_a_decoded_token_is_a_pass_of_the_layers_events() -> None:
    plan = plan_of(slots=16)
    cost = costs(plan, machine())
    kinds = {EventKind(1, 2, 0, 0): 0.5, EventKind(1, 1, 0, 1): 0.25, EventKind(1, 0, 0, 2): 0.25}
    engine = SimulatedEngine(cost, Tier.CPU)
    event_s = 0.5 * engine.event_s(1, 2, 2, 0)[0] + 0.25 * (
        engine.event_s(1, 2, 1, 1)[0] + engine.event_s(1, 2, 0, 2)[0]
    )
    prompt = {EventKind(16, 4, 0, 4): 1.0}
    speeds = predict(plan, cost, RoutingMix(kinds, [prompt, prompt], "said"))
    assert speeds.decode_tokens_per_s == pytest.approx(1 / (cost.pass_s() + LAYERS * event_s))
    prompt_s = 2 * (cost.pass_s() + LAYERS * engine.event_s(16, 2, 4, 4)[0])
    assert speeds.time_to_first_token_s == pytest.approx(prompt_s)
    assert speeds.prefill_tokens_per_s == pytest.approx(32 / prompt_s)
    assert speeds.hit_rate == pytest.approx(0.625)
    assert speeds.host_hit_rate is None


def test_copies_from_host_memory_wait_for_no_disk() -> None:
    cost = costs(plan_of(8, gpu_slots=8), machine())
    engine = SimulatedEngine(cost, Tier.GPU)
    copied, _ = engine.event_s(1, 2, 0, 2, copies=2)
    read, _ = engine.event_s(1, 2, 0, 2)
    assert copied == pytest.approx(cost.layer_s(1, 2) + 2 * cost.link_s(10 * MB) + cost.expert_s(Tier.GPU, 1))
    assert read > copied


def test_a_replay_counts_what_a_run_would() -> None:
    """The caches start empty; the first generation is not counted, and with room for all nothing is missing then."""
    trace, plan = trace_of(), plan_of(slots=32)
    mix = counted(plan, WORK, trace, Rules(), prompt_tokens=8, tokens=8, generations=2)
    assert sum(mix.decode.values()) == pytest.approx(1)
    assert {kind.tokens for kind in mix.decode} == {1}
    assert {kind.hits + kind.reads for kind in mix.decode} == {2}
    assert hit_rate(mix.decode) > 0.9
    assert [next(iter(events)).tokens for events in mix.prefill] == [8]
    half = counted(plan_of(slots=16), WORK, trace, Rules(), prompt_tokens=8, tokens=8, generations=2)
    assert hit_rate(half.decode) < hit_rate(mix.decode)


def test_two_tiers_are_replayed_together() -> None:
    mix = counted(plan_of(32, gpu_slots=8), WORK, trace_of(), Rules(), prompt_tokens=20, tokens=8, generations=3)
    assert len(mix.prefill) == 2  # 20 tokens, 16 a pass
    assert hit_rate(mix.decode) < 1
    host = host_hit_rate(mix.decode)
    assert host is not None
    assert host > 0.9


def test_rows_begin_with_a_sequence_for_each_generation() -> None:
    trace = trace_of(tokens=12, sequences=3)  # four tokens each
    assert generation_rows(trace, 2, 6) == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 0, 1]


def test_a_trace_of_another_shape_is_refused() -> None:
    with pytest.raises(TraceError, match="has 4 layers, top-2 of 9 experts, the model 4 layers, top-2 of 8"):
        counted(plan_of(8), WORK, trace_of(experts=9), Rules(), prompt_tokens=8, tokens=8, generations=1)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_typical_cache_holds_more_than_its_share(share: float) -> None:
    mix = typical(plan_of(round(32 * share)), WORK, 24)
    assert sum(mix.decode.values()) == pytest.approx(1)
    if share in (0.0, 1.0):
        assert hit_rate(mix.decode) == pytest.approx(share)
    else:
        assert share < hit_rate(mix.decode) < 1
    experts = [sum(n * (kind.hits + kind.reads) for kind, n in events.items()) for events in mix.prefill]
    assert experts == pytest.approx([8, 7])
    assert chunks(plan_of(8), 24) == [16, 8]


def test_typical_hit_rates_rise_with_either_tier() -> None:
    small, large = (typical(plan_of(8, gpu_slots=n), WORK, 8).decode for n in (4, 8))
    assert hit_rate(small) < hit_rate(large)
    near = host_hit_rate(typical(plan_of(32, gpu_slots=8), WORK, 8).decode)
    far = host_hit_rate(typical(plan_of(16, gpu_slots=8), WORK, 8).decode)
    assert near == pytest.approx(1)
    assert far is not None
    assert far < 1


def test_peaks_are_what_is_set_aside() -> None:
    plan = plan_of(16)
    assert peaks(plan) == {
        "peak_rss_bytes": sum(i.nbytes for i in plan.items if i.tier is Tier.CPU),
        "peak_gpu_bytes": None,
    }
    emulated, real = plan_of(16, gpu_slots=8), plan_of(16, gpu_slots=8, device="cuda:0")
    gpu = sum(i.nbytes for i in real.items if i.tier is Tier.GPU)
    assert peaks(emulated)["peak_gpu_bytes"] == peaks(real)["peak_gpu_bytes"] == gpu
    assert (peaks(emulated)["peak_rss_bytes"] or 0) - (peaks(real)["peak_rss_bytes"] or 0) == gpu


@pytest.mark.parametrize(
    ("plan", "profile", "said"),
    [
        (plan_of(8), None, "has not been measured.*offload profile"),
        (plan_of(8, work=None), machine(), "how many experts"),
        (plan_of(8, work=replace(WORK, precision=None)), machine(), "several precisions"),
        (plan_of(8, work=replace(WORK, precision="int2")), machine(), 'no measurement of "int2"'),
        (plan_of(8, 8), machine(with_accelerator=False), "no emulated device: .*--device emulated --link 2GB/s"),
        (replace(plan_of(8, 8), link_bytes_per_s=1e9), machine(), "a link of 2 GB/s, not 1 GB/s: .*--link 1GB/s"),
        (plan_of(8, 8, device="cuda:0"), machine(), "no cuda device: .*--device cuda"),
    ],
)
def test_what_cannot_be_predicted_is_said_and_memory_still_is(
    plan: Plan, profile: MachineProfile | None, said: str
) -> None:
    speeds, reason = forecast(plan, profile, prompt_tokens=8)
    assert speeds == Speeds(**peaks(plan))
    assert reason is not None
    with pytest.raises(ProfileError, match=said):
        raise ProfileError(reason)


def test_a_profile_that_fits_predicts_everything() -> None:
    for plan in (plan_of(8), plan_of(8, 8)):
        check_profile(machine(), plan)
        for trace in (None, trace_of()):
            speeds, reason = forecast(plan, machine(), prompt_tokens=8, tokens=8, generations=2, trace=trace)
            assert reason is None
            unknown = [name for name, value in asdict(speeds).items() if value is None]
            assert unknown == ([] if plan.gpu_mem_bytes else ["host_hit_rate", "peak_gpu_bytes"])
    said = predicted_beside(Speeds(decode_tokens_per_s=2.0), None)
    assert said["predicted_decode_tokens_per_s"] == 2.0
    assert said["decode_tokens_per_s"] is None
    assert said["predicted_peak_rss_bytes"] is None


def test_experts_on_disk_and_in_memory_have_sizes_of_their_own() -> None:
    plan = plan_of(8, work=replace(WORK, record_bytes=5 * MB))
    cost: Any = costs(plan, machine())
    assert isinstance(cost, CostModel)
    assert (cost.record_bytes, cost.expert_bytes) == (5 * MB, 10 * MB)
    whole = SimulatedEngine(costs(plan_of(8), machine()), Tier.CPU).event_s(1, 2, 0, 2)[0]
    assert SimulatedEngine(cost, Tier.CPU).event_s(1, 2, 0, 2)[0] < whole


def test_small_experts_and_the_emulated_accelerator_take_one_thread() -> None:
    assert computing_threads("emulated", 10 * MB) == 1
    assert computing_threads("cpu", 1000) == 1
    assert computing_threads("cpu", 10 * MB) is None
