"""Presets in replay: the same managers, several precisions under the simulated clock, tables and their flags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from logs import first_difference, twin

from cache.errors import FormatError, OffloadError, PolicyError
from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.traces.trace import Trace
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.costs.model import CostModel
from offload.costs.precision import parse_precisions
from offload.decide.fallbacks.base import Choice, Fallback, make_fallback
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.decide.presets import DEFAULT, PRESETS, Preset
from offload.decide.slices import Slices
from offload.decide.stacks import Stacks
from offload.options import PlanOptions
from offload.plan.prepare import make_plan
from offload.simulation.clock import run_timed
from offload.simulation.rows import Setting
from offload.simulation.systems import build_manager, importance, ranked, replay_preset
from offload.store.precisions import PrecisionStore
from offload.system.paths import machine_profile_path
from offload.terminal.main import main
from tests.cache.machines import MB, machine

quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)
SIZE = 10 * MB


@pytest.fixture(scope="module", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_trace(tokens: int = 40, sequences: int = 3, seed: int = 0) -> Trace:
    """Sticky routing with what the gates said ahead: 4 layers, top-2 of 8."""
    rng = np.random.default_rng(seed)
    count = tokens * sequences
    experts = np.zeros((count, 4, 2), np.uint8)
    for token in range(count):
        for layer in range(4):
            again = token % tokens and rng.random() < 0.5
            experts[token, layer] = experts[token - 1, layer] if again else rng.choice(8, 2, replace=False)
    ahead = np.stack([np.roll(experts, -distance, axis=1) for distance in (1, 2, 3)], axis=2)
    weights = np.tile(np.array([0.7, 0.3], np.float32), (count, 4, 1))
    return Trace.from_arrays(
        experts,
        weights,
        np.arange(0, count + 1, tokens),
        num_experts=8,
        metadata={"expert_bytes": str(SIZE), "dtype": "bfloat16"},
        predicted=ahead,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("traces") / "made.safetensors"
    make_trace().write(file)
    return file


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("machine") / "profile.json"
    machine().write(file)
    return file


def setting(**more: Any) -> Setting:
    return Setting(timed=True, machine=machine(), **more)


# Slices.


@pytest.mark.parametrize(
    "experts", ["auto", "nf4", "int8", "auto,nf4", "nf4,int2", "int4>int2", "int8>int4>int2", "int8>int2", "int4"]
)
def test_slices_are_as_a_store_has_them(tmp_path: Path, experts: str) -> None:
    """Of experts so large that alignment hardly matters, as they lie on disk and on an accelerator."""
    folder = tiny.save(tmp_path / "model", "mixtral", hidden_size=256, intermediate_size=512, num_local_experts=2)
    store = PrecisionStore(tiny.expert_map(folder), parse_precisions(experts), "cuda")
    mine = Slices.of(experts, tiny.expert_map(folder).slot_bytes, "fp32")
    assert mine.precisions == tuple(precision.slices for precision in store.precisions)
    assert mine.sizes == pytest.approx(store.slot_bytes, rel=0.03)
    assert mine.names == tuple(precision.name for precision in store.precisions)


def test_what_is_no_precision_is_refused() -> None:
    for text in ("nf5", "int2>int8", "auto>int4"):
        with pytest.raises(FormatError):
            Slices.of(text, SIZE)


# The clock.


class Upgrades(Fallback):
    """The lowest at first; the best later."""

    def choose(self, event: RoutingEvent, candidates: Any, spare_s: float) -> list[Choice]:
        return [Choice(self.precisions - 1, later=True) for _ in candidates]


@pytest.mark.parametrize("experts", ["auto,nf4", "int4>int2", "int8>int4>int2"])
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


# Rows.


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("preset", [DEFAULT, *PRESETS.values()], ids=lambda preset: preset.name)
def test_every_preset_is_replayed(path: Path, preset: Preset, device: str) -> None:
    trace = Trace.open(path)
    given = setting(device=device, host_capacity="60%", warm=True, profile=str(path))
    (row,) = replay_preset(trace, preset, ["25%"], given)
    assert row.accesses == 120 * 4 * 2
    assert row.tokens_per_s > 0 and 0 < row.hit_rate < 1 and row.bytes_from_disk_per_token > 0
    shares = sum(row.precision_shares.values()) + row.skipped_share + row.replaced_share
    assert shares == pytest.approx(1)
    assert row.lossless_share == (1.0 if preset.lossless else pytest.approx(row.precision_shares.get("bf16", 0)))
    assert (row.bytes_over_link_per_token > 0) == (device == "gpu")
    assert row.scheduler == (preset.scheduler if device == "gpu" else "gpu-only")
    json.dumps(row.as_dict(), allow_nan=False)


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


# One brain: what a preset decided live is decided again.


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("name", ["fate", "hybrimoe", "hobbit", "adapmoe", "moe-infinity", "d2moe", "freetoken"])
def test_a_presets_live_run_is_decided_again(tmp_path: Path, name: str, device: str) -> None:
    folder = tiny.save(tmp_path / "model", "mixtral", num_hidden_layers=3, num_local_experts=8)
    preset = PRESETS[name]
    with tiny.open_model(folder, preset=name, device=device) as model:
        slot = sum(pool.slot_bytes for pool in model.plan.pools)
    with tiny.open_model(folder, preset=name, device=device, expert_cache=8 * slot) as model:
        rules = model.rules
        manager = model.parts.runtime.manager
        manager.log = log = []
        for seed in range(3):
            model.generate(tiny.ids(1, 7, seed=seed), max_new_tokens=12, do_sample=False)
        model.parts.runtime.settle()
    assert sum(len(decision.fetches) for decision in log) > 8
    assert first_difference(log, twin(manager, rules, preset.fallback)) is None


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


# The command.


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["replay", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert ended.value.code == code, err
    return out, err


def test_all_presets_in_one_table(path: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [path, "--preset", "all", "--machine", profile_file, "--device", "gpu", "--host-capacity", "60%"]
    out, err = run(capsys, *flags, "--json")
    rows = json.loads(out)
    assert {row["preset"] for row in rows} == {"default", *PRESETS} - {"finemoe", "fiddler"}
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert err.count("is left out: it learns from a recorded trace") == 2
    out, _ = run(capsys, *flags, "--profile", path)
    assert all(name in out for name in (*PRESETS, "disk/token", "lossless", "on the gpu", "60% in RAM"))


def test_flags_win_over_every_preset(path: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "fate,hobbit", "--machine", profile_file, "--policy", "lfu", "--predictor", "none", "--json"]
    rows = json.loads(run(capsys, path, *flags)[0])
    assert [(row["policy"], row["predictor"], row["prefetch_depth"]) for row in rows] == [("lfu", "none", None)] * 2
    assert {row["fallback"] for row in rows} == {"none", "hobbit(skip=True)"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--preset", "fat"], "no preset is called"),
        (["--preset", "fiddler"], "name one with --profile"),
        (["--preset", "fate", "--policy", "lru,lfu"], "takes one name"),
        (["--preset", "fate", "--quota", "dp"], "--quota does nothing with --preset"),
        (["--preset", "fate", "--plot", "x.png"], "--plot does nothing with --preset"),
    ],
)
def test_mistakes_end_in_one_line(
    path: Path, profile_file: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, path, "--machine", profile_file, *arguments, code=2)
    assert complaint in err and err.count("\n") == 1


def test_a_machine_and_a_size_are_needed(path: Path) -> None:
    with pytest.raises(OffloadError, match="takes a machine and an expert's size"):
        replay_preset(Trace.open(path), DEFAULT, ["25%"], Setting())
    with pytest.raises(PolicyError, match="learns from a recorded trace"):
        replay_preset(Trace.open(path), PRESETS["fiddler"], ["25%"], setting())


def test_a_depth_goes_to_those_that_have_a_predictor(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine().write(machine_profile_path())
    with pytest.raises(SystemExit):
        main(["replay", str(path), "--preset", "default,fate", "--prefetch-depth", "2", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["preset"]: row["prefetch_depth"] for row in rows} == {"default": 2, "fate": 2}
    for names, words in (("freetoken", "none of these presets has one"), ("auto", "`offload tune` stored")):
        with pytest.raises(SystemExit):
            main(["replay", str(path), "--preset", names, "--prefetch-depth", "2"])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["replay", str(path), "--preset", "fate", "--device", "gpu", "--host-capacity", "200%"])
    assert '--host-capacity "200%": a share' in capsys.readouterr().err


def test_shares_of_precisions_with_one_name_add_up() -> None:
    trace = make_trace()
    trace.metadata["precision"] = "nf4"
    (row,) = replay_preset(trace, PRESETS["hobbit"], ["25%"], setting())
    assert sum(row.precision_shares.values()) + row.skipped_share == pytest.approx(1)
