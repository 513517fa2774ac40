"""Presets, live and in a replay: the same slices, the same caches, the same decisions."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
from logs import first_difference, hold, twin
from own_cache import own_cache

from cache.traces.trace import Trace
from cache.types import Tier
from offload.costs.precision import parse_precisions
from offload.decide.presets import PRESETS
from offload.decide.slices import Slices
from offload.options import PlanOptions
from offload.plan.prepare import make_plan
from offload.simulation.systems import build_manager
from offload.store.precisions import PrecisionStore

_cache_folder = pytest.fixture(scope="module", autouse=True)(own_cache)


@pytest.mark.parametrize(
    "experts",
    [
        "auto",
        "nf4",
        "int8",
        "auto,nf4",
        "nf4,int2",
        "int4>int2",
        "int8>int4>int2",
        "int4>int3>int2",
        "int8>int2",
        "int4",
    ],
)
def test_slices_are_as_a_store_has_them(tmp_path: Path, experts: str) -> None:
    """Of experts so large that alignment hardly matters, as they lie on disk and on an accelerator."""
    folder = tiny.save(tmp_path / "model", "mixtral", hidden_size=256, intermediate_size=512, num_local_experts=2)
    store = PrecisionStore(tiny.expert_map(folder), parse_precisions(experts), "cuda")
    mine = Slices.of(experts, tiny.expert_map(folder).slot_bytes, "fp32")
    assert mine.precisions == tuple(precision.slices for precision in store.precisions)
    assert mine.sizes == pytest.approx(store.slot_bytes, rel=0.03)
    assert mine.names == tuple(precision.name for precision in store.precisions)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    "name",
    [
        *("fate", "hybrimoe", "hobbit", "adapmoe", "moe-infinity", "expertflow", "d2moe", "freetoken"),
        *("expert-buffering", "monde", "se-moe", "dali"),
    ],
)
def test_a_presets_live_run_is_decided_again(tmp_path: Path, name: str, device: str) -> None:
    folder = tiny.save(tmp_path / "model", "mixtral", num_hidden_layers=3, num_local_experts=8)
    preset = PRESETS[name]
    if device == "cpu" and preset.divides:
        warnings.filterwarnings("ignore", "--preset .* runs without its scheduler")
    with tiny.open_model(folder, preset=name, device=device) as model:
        slot = sum(pool.slot_bytes for pool in model.plan.pools)
    with tiny.open_model(folder, preset=name, device=device, expert_cache=8 * slot) as model:
        rules = model.rules
        manager = model.parts.runtime.manager
        manager.log = log = []
        again = twin(manager, rules, preset.fallback)
        hold(again, manager)
        for seed in range(3):
            model.generate(tiny.ids(1, 7, seed=seed), max_new_tokens=12, do_sample=False)
        model.parts.runtime.settle()
    assert sum(len(decision.fetches) for decision in log) > 4
    assert first_difference(log, again) is None


def test_a_replayed_manager_has_the_caches_of_a_live_one(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "mixtral", hidden_size=256, intermediate_size=512, num_local_experts=8)
    plan = make_plan(folder, PlanOptions(cpu_mem="8G", device="cpu", context=64, preset="hobbit", expert_cache="24M"))
    trace = Trace.from_arrays(
        np.zeros((1, plan.layers, 1)), np.ones((1, plan.layers, 1)), [0, 1], num_experts=8, metadata={}
    )
    slices = Slices.of("auto,nf4", plan.slot_bytes, "fp32")
    manager = build_manager(trace, PRESETS["hobbit"], {Tier.CPU: 24 * 2**20}, slices)
    mine = [
        stack[0].capacity_bytes // size
        for stack, size in zip(manager.stacks.by_slice, manager.stacks.sizes, strict=True)
    ]
    assert mine == [pool.slots[Tier.CPU] for pool in plan.pools]
