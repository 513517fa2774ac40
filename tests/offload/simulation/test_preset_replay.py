"""Presets in replay: the same managers, several precisions under the simulated clock, and the rows of tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_trace import SIZE, make_trace

from cache.errors import FormatError, OffloadError, PolicyError
from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.traces.profiles import use_counts
from cache.traces.trace import Trace
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.costs.model import CostModel
from offload.decide.fallbacks.base import Choice, Fallback, make_fallback
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.decide.preset import DEFAULT, Preset
from offload.decide.presets import PRESETS
from offload.decide.slices import Slices
from offload.decide.stacks import Stacks
from offload.simulation.clock import run_timed
from offload.simulation.preset_rows import ranked
from offload.simulation.rows import Setting
from offload.simulation.systems import build_manager, importance, replay_preset
from tests.cache.machines import MB, machine


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("traces") / "made.safetensors"
    make_trace().write(file)
    return file


def setting(**more: Any) -> Setting:
    return Setting(timed=True, machine=machine(), **more)


def test_what_is_no_precision_is_refused() -> None:
    for text in ("nf5", "int2>int8", "auto>int4"):
        with pytest.raises(FormatError):
            Slices.of(text, SIZE)


class Upgrades(Fallback):
    """The lowest at first; the best later."""

    def choose(self, event: RoutingEvent, candidates: Any, spare_s: float) -> list[Choice]:
        return [Choice(self.precisions - 1, later=True) for _ in candidates]


@pytest.mark.parametrize("experts", ["auto,nf4", "int4>int3>int2", "int8>int4>int2"])
@pytest.mark.parametrize("device", [Tier.CPU, Tier.GPU])
def test_every_slice_travels_at_its_own_size(experts: str, device: Tier) -> None:
    trace = make_trace()
    slices = Slices.of(experts, SIZE)
    stacks = [
        [
            ExpertCache(tier, [20 * nbytes], make_policy("lru", Lanes.shared(4, 8, 20)))
            for tier in ([Tier.GPU, Tier.CPU] if device is Tier.GPU else [Tier.CPU])
        ]
        for nbytes in slices.sizes
    ]
    fallback = Upgrades(4, 8, len(slices.precisions))
    manager = Manager(Stacks(stacks, slices.sizes, slices.precisions), fallback=fallback)
    cost = CostModel(machine(), expert_bytes=SIZE, tier=device, dense_layer_bytes=5 * MB)
    read = 0

    def each(event: RoutingEvent, plan: LayerPlan) -> None:
        nonlocal read
        fetches = (*plan.fetches, *plan.late_fetches, *plan.prefetches)
        read += sum(slices.sizes[fetch.slice] for fetch in fetches if fetch.source is Tier.DISK)

    timeline = run_timed(trace, manager, cost, cold=False, each=each)
    manager.check_integrity()
    assert timeline.bytes_from_disk == read > 0
    assert all(manager.serving.uses[index] > 0 for index in (0, -1))
    assert timeline.phases[list(timeline.phases)[1]].tokens == 120
    assert 0 < timeline.stall_s < sum(time.seconds for time in timeline.phases.values())


def test_one_precision_takes_as_long_either_way() -> None:
    """A fallback that never degrades changes nothing."""
    trace = make_trace()
    cost = CostModel(machine(), expert_bytes=SIZE, tier=Tier.GPU, dense_layer_bytes=5 * MB)
    room = {Tier.GPU: 10 * SIZE, Tier.CPU: 20 * SIZE}
    plain_default = replace(DEFAULT, predictor="none")
    plain = run_timed(trace, build_manager(trace, plain_default, room, Slices.of("auto", SIZE)), cost, cold=False)
    stacks = [[ExpertCache(t, [n], make_policy("lfru", Lanes.shared(4, 8, n // SIZE))) for t, n in room.items()]]
    mixed = Manager(Stacks(stacks, [SIZE], [(0,)]), fallback=make_fallback("none", 4, 8, 1))
    again = run_timed(trace, mixed, cost, cold=False)
    assert again.tiers == plain.tiers and again.bytes_from_disk == plain.bytes_from_disk
    assert again.stall_s == pytest.approx(plain.stall_s)
    assert again.tokens_per_s == pytest.approx(plain.tokens_per_s)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("preset", [DEFAULT, *PRESETS.values()], ids=lambda preset: preset.name)
def test_every_preset_is_replayed(path: Path, preset: Preset, device: str) -> None:
    trace = Trace.open(path)
    given = setting(device=device, host_capacity="60%", warm=True, profile=str(path))
    (row,) = replay_preset(trace, preset, ["25%"], given)
    assert row.accesses == 120 * 4 * 2
    assert row.tokens_per_s > 0 and 0 < row.hit_rate < 1 and row.bytes_from_disk_per_token > 0
    shares = sum(row.precision_shares.values()) + row.skipped_share + row.replaced_share + row.dropped_share
    assert shares == pytest.approx(1)
    assert row.lossless_share == (1.0 if preset.lossless else pytest.approx(row.precision_shares.get("bf16", 0)))
    moves = device == "gpu" and preset.name != "fiddler"  # whose accelerator is full from the start
    assert (row.bytes_over_link_per_token > 0) == moves
    assert row.scheduler == (preset.scheduler if device == "gpu" else "gpu-only")
    json.dumps(row.as_dict(), allow_nan=False)


def test_a_rule_that_drops_experts_of_tokens_drops_them_in_a_replay(path: Path) -> None:
    """A token's second expert has .3 of its weight: .09 is under the threshold, in every layer."""
    gated = replace(PRESETS["adapmoe"], fallback="adapmoe(skip=True, threshold=.1)")
    (row,) = replay_preset(Trace.open(path), gated, ["25%"], setting(warm=True))
    assert (row.accesses, row.dropped_share) == (120 * 4, 0.5)
    assert (row.lossless_share, row.precision_shares, row.skipped_share) == (0.5, {"bf16": 0.5}, 0)
    (whole,) = replay_preset(Trace.open(path), DEFAULT, ["25%"], setting(warm=True))
    assert row.bytes_from_disk_per_token < whole.bytes_from_disk_per_token


def test_fiddler_has_the_experts_used_most_on_the_accelerator_from_the_start(path: Path) -> None:
    """A quarter is eight of 32 experts: every use of these is a hit, and no other."""
    given = setting(device="gpu", host_capacity="100%", warm=True, profile=str(path))
    (row,) = replay_preset(Trace.open(path), PRESETS["fiddler"], ["25%"], given)
    counts = np.sort(use_counts(Trace.open(path)), axis=None)
    assert row.hit_rate == counts[-8:].sum() / counts.sum()


def test_rows_are_ranked_by_speed(path: Path) -> None:
    trace = Trace.open(path)
    rows = [row for preset in (DEFAULT, PRESETS["d2moe"]) for row in replay_preset(trace, preset, ["25%"], setting())]
    found = ranked(rows)
    assert [row.rank for row in found] == [1, 2]
    assert found[0].tokens_per_s > found[1].tokens_per_s


def test_what_a_trace_says_of_importance() -> None:
    trace = make_trace(tokens=3, sequences=1)
    found = importance(trace)
    assert len(found) == 32 and sum(found.values()) == pytest.approx(3 * 4)
    first = ExpertKey(0, int(trace.experts[0, 0, 0]))
    assert found[first] >= 0.7


def test_a_machine_and_a_size_are_needed(path: Path) -> None:
    with pytest.raises(OffloadError, match="takes a machine and an expert's size"):
        replay_preset(Trace.open(path), DEFAULT, ["25%"], Setting())
    with pytest.raises(PolicyError, match="learns from a recorded trace"):
        replay_preset(Trace.open(path), PRESETS["fiddler"], ["25%"], setting())


def test_shares_of_precisions_with_one_name_add_up() -> None:
    trace = make_trace()
    trace.metadata["precision"] = "nf4"
    (row,) = replay_preset(trace, PRESETS["hobbit"], ["25%"], setting())
    assert sum(row.precision_shares.values()) + row.skipped_share == pytest.approx(1)
