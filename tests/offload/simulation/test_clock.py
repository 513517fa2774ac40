"""The simulated clock by hand: what overlaps, what waits, and that counting adds up to the same seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cache.counting.counting import count
from cache.lanes import Lanes
from cache.policy import make_policy, names
from cache.residency import ExpertCache
from cache.traces.trace import Trace
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.costs.model import CostModel
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.prefill import Prefill
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, timed
from offload.decide.split import Split
from offload.decide.stacks import Stacks
from offload.simulation.clock import run_timed
from offload.simulation.compare import _seconds
from offload.simulation.engine import SimulatedEngine
from predictors.base import make_predictor
from tests.cache.machines import MB, machine

K = ExpertKey
EXPERT = 10 * MB


def cost(tier: Tier = Tier.CPU, dense_s: float = 0.0) -> CostModel:
    """Reads: 10.1 ms when idle, then 10 ms each; an expert 1 ms on the CPU, .1 ms on the GPU; the link 6 ms."""
    return CostModel(machine(), expert_bytes=EXPERT, tier=tier, dense_layer_s=dense_s)


def plan(resident: int, fetches: list[Tier], late: list[Tier] = ()) -> LayerPlan:  # type: ignore[assignment]
    """One token; experts 0, 1, ... resident, then fetched, then fetched late."""
    total = resident + len(fetches) + len(late)
    event = RoutingEvent(
        0, 0, 0, Phase.DECODE, tuple(range(total)), tuple(float(i) for i in range(total)), (1,) * total
    )
    made = LayerPlan(event)
    made.resident = [K(0, i) for i in range(resident)]
    made.fetches = [Fetch(K(0, resident + i), source) for i, source in enumerate(fetches)]
    made.late_fetches = [Fetch(K(0, resident + len(fetches) + i), source) for i, source in enumerate(late)]
    made.waiting = {fetch.key: (0,) for fetch in (*made.fetches, *made.late_fetches)}
    return made


def times(plan: LayerPlan, tier: Tier = Tier.CPU) -> tuple[float, float]:
    """(milliseconds of the event beside the layer's own, of which stalled)."""
    model = cost(tier)
    top_k = len(plan.event.experts)
    engine = SimulatedEngine(model, tier, top_k)
    engine.begin(plan.event)
    seconds, stall_s, _ = engine.run(plan, lambda fetch: None)
    return seconds * 1e3, stall_s * 1e3


def test_residents_take_their_own_time() -> None:
    assert times(plan(3, [])) == pytest.approx((3.0, 0.0))


def test_a_read_hides_behind_residents_and_slows_them() -> None:
    # While a read is under way computing is 1.5 times slower, and it 1.25 times: 12.625 ms; then the arrival, 1 ms.
    assert times(plan(2, [Tier.DISK])) == pytest.approx((13.625, 12.625 - 3.0))


def test_reads_go_one_after_the_other_and_arrivals_compute_between_them() -> None:
    # Lands at 10.1, then 20.1; the first is computed while the second is read.
    assert times(plan(0, [Tier.DISK, Tier.DISK])) == pytest.approx((21.1, 20.1 - 1.5))


def test_late_fetches_start_when_the_residents_are_done() -> None:
    assert times(plan(2, [], [Tier.DISK])) == pytest.approx((2.0 + 12.625 + 1.0, 12.625))


def test_what_ram_has_takes_the_link_only() -> None:
    assert times(plan(1, [Tier.CPU, Tier.CPU]), Tier.GPU) == pytest.approx((12.1, 12.0 - 0.1 - 0.1))


def test_the_link_takes_what_is_ready_first() -> None:
    engine = SimulatedEngine(cost(Tier.GPU), Tier.GPU)
    _, _, landed = engine.run(plan(0, [Tier.DISK, Tier.CPU]), 2)
    assert [fetch.key.expert for fetch in landed] == [1, 0]


def random_trace(seed: int, prompt: int = 4, chunk: int = 4) -> Trace:
    """Three sequences of a prompt, in chunks, and 26 single tokens in all; 2 layers, top-2 of 6."""
    rng = np.random.default_rng(seed)
    lengths = [prompt + 13, prompt + 5, prompt + 8]
    tokens = sum(lengths)
    experts = np.argsort(rng.random((tokens, 2, 6)), axis=-1)[:, :, :2]
    weights = np.sort(rng.random((tokens, 2, 2)), axis=-1)[:, :, ::-1]
    offsets = np.cumsum([0, *lengths])
    chunks = prompt // chunk
    step = np.concatenate([np.minimum(i // chunk, chunks) + np.maximum(i - prompt, 0) for i in map(np.arange, lengths)])
    phase = np.concatenate([(np.arange(n) >= prompt).astype(np.uint8) for n in lengths])
    return Trace.from_arrays(experts, weights, offsets, num_experts=6, step=step, phase=phase)


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("pool", ["layer", "global"])
@pytest.mark.parametrize("policy", names())
def test_counting_and_the_clock_agree(policy: str, pool: str, cold: bool) -> None:
    """The same hits, and for decoding the same seconds, since its events are all of one kind."""
    trace, profile = random_trace(1), random_trace(2)
    slots = [3, 3] if pool == "layer" else [6]
    lanes = Lanes.per_layer(2, 6, slots) if pool == "layer" else Lanes.shared(2, 6, 6)
    model = cost()
    cache = ExpertCache(Tier.CPU, [n * EXPERT for n in slots], make_policy(policy, lanes, profile))
    timeline = run_timed(trace, Manager(Stacks.single([cache], EXPERT)), model, cold=cold)
    (counted,) = count(trace, policy, [slots], pool=pool, cold=cold, profile=profile, kinds=True)
    stats = timeline.tiers[Tier.CPU]
    hits = stats.hits + stats.late_hits  # what a policy brings in by itself may be late
    assert (counted.hits, counted.misses, counted.bypasses) == (hits, stats.misses, stats.bypasses)
    stall_s, tokens_per_s = _seconds(counted, trace, model)
    if not cache.policy.bypass:  # whose fetches may have to wait for a place
        assert tokens_per_s == pytest.approx(timeline.tokens_per_s, rel=1e-9)
    assert stall_s == pytest.approx(timeline.stall_s, rel=0.2)
    assert timeline.phases[Phase.DECODE].tokens == 38 - 12
    assert timeline.phases[Phase.PREFILL].passes == 3


def replayed(
    trace: Trace,
    tier: Tier,
    predictor: str | None,
    depth: int = 1,
    slots: int = 6,
    dense_s: float = 0.0,
    prefill: Prefill | None = None,
    **kwargs: Any,
) -> Any:
    """A timed replay of `trace` with caches of so many experts; with a prefetcher unless `predictor` is None."""
    tiers = [Tier.CPU] if tier is Tier.CPU else [Tier.GPU, Tier.CPU]
    lanes = [Lanes.shared(2, 6, slots if t is tier else 12) for t in tiers]
    caches = [ExpertCache(t, [n.slots[0] * EXPERT], make_policy("lru", n)) for t, n in zip(tiers, lanes, strict=True)]
    prefetcher = None
    if predictor is not None:
        made = make_predictor(predictor, 2, 6, trace if predictor == "oracle" else None)
        prefetcher = Prefetcher(made, depth, adaptive=False)
    manager = Manager(Stacks.single(caches, EXPERT), prefetcher=prefetcher, prefill=prefill)
    timeline = run_timed(trace, manager, cost(tier, dense_s), **kwargs)
    manager.check_integrity()
    return timeline


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("tier", [Tier.CPU, Tier.GPU])
@pytest.mark.parametrize("slots", [1, 4, 6])
def test_without_predictions_both_engines_give_the_same_times(tier: Tier, cold: bool, slots: int) -> None:
    trace = random_trace(3)
    plain = replayed(trace, tier, None, cold=cold, slots=slots)
    ahead = replayed(trace, tier, "none", cold=cold, slots=slots)
    assert plain.tiers == ahead.tiers
    for phase in Phase:
        assert ahead.phases[phase].seconds == pytest.approx(plain.phases[phase].seconds, rel=1e-9)
        assert ahead.phases[phase].stall_s == pytest.approx(plain.phases[phase].stall_s, rel=1e-9)


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.GPU])
def test_an_oracle_saves_stall(tier: Tier) -> None:
    trace = random_trace(4)
    plain, ahead = (replayed(trace, tier, name, cold=False, slots=8, dense_s=0.02) for name in ("none", "oracle"))
    counts = ahead.tiers[tier]
    assert counts.useful_prefetches > 0 and counts.wasted_prefetches == 0
    assert ahead.stall_s < 0.8 * plain.stall_s
    assert ahead.phases[Phase.DECODE].seconds < plain.phases[Phase.DECODE].seconds


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.GPU])
def test_prompts_are_streamed_and_replies_timed_as_ever(tier: Tier) -> None:
    """Reading takes less time, the dense part being long enough; a reply begins with what the prompt left."""
    trace = random_trace(5, prompt=64, chunk=16)
    dense_s = 0.05
    found = {
        way: replayed(trace, tier, ahead, slots=8, dense_s=dense_s, prefill=prefill, cold=False)
        for way, ahead, prefill in (
            ("on-demand", None, None),
            ("kept", None, Prefill(2, 6, streams=False)),
            ("streamed", "none", Prefill(2, 6)),
        )
    }
    seconds = {way: timeline.phases[Phase.PREFILL].seconds for way, timeline in found.items()}
    assert seconds["streamed"] < seconds["kept"] < seconds["on-demand"]
    assert {timeline.phases[Phase.DECODE].passes for timeline in found.values()} == {26}
    assert {timeline.phases[Phase.PREFILL].passes for timeline in found.values()} == {12}
    assert found["streamed"].tiers[tier].useful_prefetches > 0


def test_replies_alone_are_decided_and_timed_as_without() -> None:
    trace = random_trace(6)
    phase = np.ones_like(trace.phase)
    only = Trace.from_arrays(trace.experts, trace.weights, trace.sequence_offsets, num_experts=6, phase=phase)
    plain = replayed(only, Tier.CPU, None, cold=False)
    streamed = replayed(only, Tier.CPU, "none", prefill=Prefill(2, 6), cold=False)
    assert plain.tiers == streamed.tiers and plain.phases == streamed.phases


# Layers divided between accelerator and CPU.


class _Halves(Scheduler):
    """What is missing is computed on the CPU, the rest on the accelerator."""

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        missing = [i for i, load in enumerate(loads) if not load.cached]
        return timed(loads, costs, [i for i, load in enumerate(loads) if load.cached], missing)


def divided(events: Sequence[tuple[int, ...]], host: Sequence[int] = ()) -> tuple[Any, Manager, CostModel]:
    """A timeline of one layer's events, 2 of 8 experts each, with 2 places on the accelerator; `host` has some."""
    experts = np.array(events)[:, None, :]
    trace = Trace.from_arrays(experts, np.tile([0.6, 0.4], (len(events), 1, 1)), [0, len(events)], num_experts=8)
    priced = cost(Tier.GPU)
    caches = [
        ExpertCache(tier, [n * EXPERT], make_policy("lru", Lanes.shared(1, 8, n)))
        for tier, n in ((Tier.GPU, 2), (Tier.CPU, 8))
    ]
    for expert in host:
        caches[1].reserve(ExpertKey(0, expert), EXPERT)
        caches[1].commit(ExpertKey(0, expert))
    manager = Manager(Stacks.single(caches, EXPERT), split=Split(_Halves(), SplitCosts.modelled(priced)))
    return run_timed(trace, manager, priced, cold=False), manager, priced


def test_the_cpu_computes_beside_the_accelerator() -> None:
    """The first event fills both places; of the second one, one expert each is computed on either processor."""
    host = range(8)
    first, _, _ = divided([(0, 1)], host)
    both, manager, priced = divided([(0, 1), (0, 2)], host)
    event_s = sum(both.phases[phase].seconds - first.phases[phase].seconds for phase in Phase)
    on_gpu_s, on_cpu_s = priced.expert_s(Tier.GPU, 1), priced.cpu_start_s + priced.expert_s(Tier.CPU, 1)
    assert event_s == pytest.approx(priced.pass_s() + priced.layer_s(1, 2) + max(on_gpu_s, on_cpu_s))
    assert both.stall_s - first.stall_s == pytest.approx(max(on_cpu_s - on_gpu_s, 0))
    assert manager.stats[Tier.GPU].on_cpu == 1 and both.bytes_from_disk == 0


def test_what_the_cpu_lacks_is_read_and_crosses_no_link() -> None:
    first, before, _ = divided([(0, 1)], [0, 1])
    both, manager, priced = divided([(0, 1), (0, 2)], [0, 1])
    event_s = sum(both.phases[phase].seconds - first.phases[phase].seconds for phase in Phase)
    read_s = priced.read_s(EXPERT, alone=True, computing=True)
    assert event_s == pytest.approx(priced.pass_s() + priced.layer_s(1, 2) + read_s + priced.expert_s(Tier.CPU, 1))
    assert both.bytes_from_disk == EXPERT
    assert manager.stats[Tier.GPU].bytes_in == before.stats[Tier.GPU].bytes_in == 20 * MB
