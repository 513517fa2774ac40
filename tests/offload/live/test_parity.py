"""One brain, two clocks: what was decided live is decided again in a replay, event by event."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from live_model import drive
from logs import first_difference, twin

from cache.policy import find_policy, names
from cache.traces.trace import Trace
from cache.types import RoutingEvent, Tier
from offload.costs.model import CostModel
from offload.decide.log import Decision
from offload.decide.plan import LayerPlan
from offload.simulation.clock import run_timed
from tests.cache.machines import machine

LIVE = [name for name in names() if find_policy(name).causal and not find_policy(name).learns and name != "dali"]
LIVE += ["dali(w_size=2)"]


@pytest.mark.parametrize("prefill", ["kept", "on-demand"])
@pytest.mark.parametrize("pool", ["global", "layer"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("policy", LIVE)
def test_a_live_run_is_decided_again(
    folder: Path, tmp_path: Path, policy: str, device: str, pool: str, prefill: str
) -> None:
    """With the completions as recorded, and again from the trace alone under a simulated clock."""
    path = tmp_path / "live.safetensors"
    with tiny.open_model(folder, policy=policy, pool=pool, device=device) as model:
        slot = model.plan.slot_bytes
    rules = {"policy": policy, "pool": pool, "device": device, "prefill": prefill, "predictor": "none"}
    with tiny.open_model(folder, expert_cache=7 * slot, **rules) as model:
        manager = model.parts.runtime.manager
        manager.log = log = []
        scores = find_policy(policy).uses_scores
        with model.record_trace(path, scores=scores):
            drive(model)
        live_stats = manager.stats
    assert len(log) > 90
    assert sum(len(decision.fetches) for decision in log) > 50

    assert first_difference(log, twin(manager, model.rules)) is None
    if find_policy(policy).exchanges:  # what nobody waits for lands sooner or later, as the machine will have it
        assert any(decision.prefetches for decision in log)
        return

    again: list[Decision] = []
    trace = Trace.open(path)

    def check(event: RoutingEvent, plan: LayerPlan) -> None:
        again.append(Decision.of(plan))

    replayed = twin(manager, model.rules)
    cost = CostModel(machine(), expert_bytes=slot, tier=manager.computing.tier, dense_layer_bytes=0)
    timeline = run_timed(trace, replayed, cost, cold=False, each=check)
    assert len(again) == len(log)
    for mine, recorded in zip(again, log, strict=True):
        assert (mine.event.layer, mine.event.experts, mine.event.weights, mine.event.tokens, mine.event.phase) == (
            recorded.event.layer, recorded.event.experts, recorded.event.weights, recorded.event.tokens,
            recorded.event.phase,
        )  # fmt: skip
        assert (mine.resident, mine.fetches) == (recorded.resident, recorded.fetches)
    for tier, stats in timeline.tiers.items():
        assert stats == live_stats[tier]


def test_a_tampered_log_is_noticed(folder: Path) -> None:
    with tiny.open_model(folder, device="cpu") as model:
        slot = model.plan.slot_bytes
    with tiny.open_model(folder, device="cpu", expert_cache=5 * slot, predictor="none") as model:
        manager = model.parts.runtime.manager
        manager.log = log = []
        drive(model)
    changed = next(i for i, decision in enumerate(log) if decision.fetches and i > 40)
    first = log[changed].fetches[0]
    log[changed].fetches = (
        type(first)(first.key, Tier.GPU, first.admitted, first.evicted, first.late), *log[changed].fetches[1:]
    )  # fmt: skip
    assert first_difference(log, twin(manager, model.rules)) == changed
