"""One brain, two clocks: what was decided live is decided again in a replay, event by event."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from logs import first_difference, twin

from cache.policy import find_policy, names
from cache.traces.trace import Trace
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.costs.model import CostModel
from offload.decide.log import Decision
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.decide.stacks import Stacks
from offload.simulation.clock import run_timed
from tests.cache.machines import machine

LIVE = [name for name in names() if find_policy(name).causal and not find_policy(name).learns]
one_thread = pytest.fixture(scope="module", autouse=True)(tiny.one_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tiny.save(tmp_path_factory.mktemp("parity"), "mixtral", num_hidden_layers=3, num_local_experts=8)


def drive(model: Any) -> None:
    """Prompts of several lengths, a padded batch, sampling, and a prompt read in chunks."""
    model.generate(tiny.ids(1, 7), max_new_tokens=12, do_sample=False)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    model.generate(tiny.ids(2, 6, seed=1), attention_mask=mask, max_new_tokens=10, do_sample=True)
    model.generate(tiny.ids(1, 33, seed=2), max_new_tokens=9, prefill_chunk_size=8, do_sample=False)


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


def test_failed_transfers_are_part_of_the_log() -> None:
    manager = Manager(Stacks.single([tiny.cache_of(Tier.CPU, 2, 64, 1, 8)], 64))
    manager.log = log = []
    for step, experts in enumerate([(0, 1), (2, 1), (0, 3), (2, 3), (1, 0)]):
        plan = manager.step(tiny.event(0, experts, step))
        for fetch in (*plan.fetches, *plan.late_fetches):
            if fetch.key == ExpertKey(0, 2):
                manager.failed(fetch)
            else:
                manager.arrived(fetch, 64)
        manager.finish()
    assert any(not arrived for decision in log for _, _, arrived in decision.completions)
    assert first_difference(log, Manager(Stacks.single([tiny.cache_of(Tier.CPU, 2, 64, 1, 8)], 64))) is None
