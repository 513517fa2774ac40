"""Presets in a live model: they run, what is lossless is, and a flag of one's own wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from own_cache import own_cache

from cache.errors import PolicyError, ProfileError
from offload.decide.preset import Preset
from offload.decide.presets import PRESETS
from offload.layers.calibration import Calibration, gates_fingerprint
from offload.model import OffloadedModel
from offload.options import PlanOptions
from offload.plan.prepare import make_plan
from offload.plan.tuned import Place, Tuned
from offload.system.paths import calibration_path, own_place

_cache_folder = pytest.fixture(scope="module", autouse=True)(own_cache)


@pytest.fixture(scope="module")
def trace(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "profile.safetensors"
    with tiny.open_model(folder) as model, model.record_trace(path, predicted=2):
        for seed in range(3):
            model.generate(tiny.ids(1, 6, seed=seed), max_new_tokens=8, do_sample=False)
    return path


def options_of(preset: Preset, trace: Path) -> dict[str, Any]:
    more = {"profile": trace} if preset.learns else {}
    return {"preset": preset.name, "device": "emulated", **more}


def tokens(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(tiny.ids(1, 7), max_new_tokens=16, do_sample=False)
    return found


@pytest.mark.parametrize(
    "preset", [p for p in PRESETS.values() if not p.needs_calibration], ids=lambda preset: preset.name
)
def test_every_preset_runs_live(folder: Path, trace: Path, preset: Preset) -> None:
    options = options_of(preset, trace)
    with tiny.open_model(folder, **options) as model:
        slot = sum(pool.slot_bytes for pool in model.plan.pools)
    with tiny.open_model(folder, **options, expert_cache=9 * slot) as model:
        said = tokens(model)
        stats = model.stats
        assert sum(stats.precision_uses.values()) == stats.tiers[stats.computing].counts.accesses > 0
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()
    if preset.lossless:
        assert torch.equal(said, tokens(tiny.resident(folder)))


def test_a_profile_outlives_the_predictor(folder: Path, trace: Path) -> None:
    with tiny.open_model(folder, policy="static", profile=trace) as model:
        model.use_predictor("none")
        model.use_predictor("expert-map")
        assert model.rules.profile is not None and model.rules.make_policy(3, 8, 6).name == "static"


def test_edgemoe_asks_for_a_calibration_and_fetches_ahead_at_the_best(folder: Path) -> None:
    with pytest.raises(PolicyError, match="run `offload calibrate` first"):
        tiny.open_model(folder, preset="edgemoe")
    with tiny.open_model(folder) as model:
        fingerprint = gates_fingerprint(model.module, model.parts.experts)
    by_expert = np.linspace(1, 2, 24, dtype=np.float32).reshape(3, 8)
    offsets = np.zeros((3, 2), np.float32)
    found = Calibration(fingerprint, offsets, {}, by_expert, by_expert[:, 0], by_expert)
    found.write(own_place(calibration_path(fingerprint)))
    with tiny.open_model(folder, preset="edgemoe", device="emulated") as model:
        assert [each.name for each in model.parts.store.slices] == ["nf4", "int2"]
        tokens(model)
        assert min(model.stats.precision_uses.values()) > 0
    calibration_path(fingerprint).unlink()


@pytest.mark.parametrize("name", [p.name for p in PRESETS.values() if p.learns])
def test_what_learns_says_what_to_pass(folder: Path, name: str) -> None:
    with pytest.raises(PolicyError, match=f"preset {name} learns from a recorded trace: record one with .* --p"):
        tiny.open_model(folder, preset=name)


def test_presets_reach_plans_and_models(folder: Path) -> None:
    plan = make_plan(folder, PlanOptions(cpu_mem="8G", device="cpu", context=64, preset="hobbit"))
    assert [pool.name for pool in plan.pools] == ["fp32", "nf4"]
    with tiny.open_model(folder, preset="fate", policy="lfu") as model:
        manager = model.parts.runtime.manager
        assert manager.computing.policy.name == "lfu" and len(manager.computing.capacities) == 3
        assert manager.prefetcher is not None and manager.prefetcher.depth == 1


def test_auto_runs_what_is_stored_and_says_so_if_nothing_is(folder: Path) -> None:
    budgets: dict[str, Any] = {"gpu_mem": "1G", "cpu_mem": "8G", "expert_cache": None}
    with pytest.warns(UserWarning, match="offload tune"), tiny.open_model(folder, preset="auto", device="emulated"):
        pass
    place = Place.of(folder, PlanOptions(device="emulated", **budgets))
    assert Tuned.read(place) is None
    Tuned(place, PRESETS["fate"]).write()
    assert Tuned.read(Place.of(folder, PlanOptions(device="emulated", gpu_mem=2**30, cpu_mem="8GiB"))) == Tuned(
        place, PRESETS["fate"], []
    )
    with tiny.open_model(folder, preset="auto", device="emulated") as model:
        assert model.parts.runtime.manager.computing.policy.name == "arc"
    place.path.write_text("[" * 10**5)
    with pytest.raises(ProfileError, match="run `offload tune` again"):
        Tuned.read(place)
    place.path.write_text("{}")
    with pytest.raises(Exception, match="run `offload tune` again"):
        OffloadedModel.from_pretrained(folder, preset="auto", device="emulated", gpu_mem="1G", cpu_mem="8G")
