"""Experts at several precisions: the decision loop, and live models on every device."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from logs import first_difference

from cache.errors import FormatError, PolicyError
from cache.residency import State
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.fallbacks.base import SKIP, Candidate, Choice, Fallback
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.pace import Pace
from offload.decide.parcel import Parcel
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, timed
from offload.decide.split import Split
from offload.decide.stacks import Stacks
from offload.model import OffloadedModel
from offload.options import PlanOptions
from offload.plan.prepare import make_plan
from predictors.base import Prediction, make_predictor

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

K = ExpertKey
LAYERS, EXPERTS = 3, 8
APART, NESTED = ((0,), (1,)), ((0, 1), (0,))


class Dice(Fallback):
    """Any choice there is, at random; a precision without slices to fetch as often as others."""

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.random = random.Random(3)

    def target(self, key: ExpertKey) -> int:
        return (key.layer * 5 + key.expert) % 4 == 0

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        for candidate in candidates:
            assert 0 <= candidate.before < 1 and 0 < candidate.share <= 1
            assert candidate.held is None or candidate.held > candidate.target
        return [
            Choice(self.random.choice([*range(c.target, self.precisions), SKIP]), later=self.random.random() < 0.5)
            for c in candidates
        ]


def manager_of(
    precisions: Sequence[Sequence[int]], slots: Sequence[dict[Tier, int]], fallback: Fallback | None = None, **more: Any
) -> Manager:
    stacks = [
        [tiny.cache_of(tier, count, 10 * (i + 1), LAYERS, EXPERTS) for tier, count in tiers.items()]
        for i, tiers in enumerate(slots)
    ]
    sizes = [10 * (i + 1) for i in range(len(slots))]
    fallback = fallback or Dice(LAYERS, EXPERTS, len(precisions))
    return Manager(Stacks(stacks, sizes, precisions), fallback=fallback, **more)


class Coin(Scheduler):
    """Any processor and any option that a load has, at random."""

    name = "coin"

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(5)

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        raise AssertionError("it serves")

    def serve(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        gpu: list[int] = []
        cpu: list[int] = []
        served: dict[int, int] = {}
        for i, load in enumerate(loads):
            now = load
            assert load.left_out == (load.precision == SKIP)
            assert all(option.loss < load.loss or not load.loss for option in load.options)
            if load.options and self.random.random() < 0.5:
                served[i] = self.random.randrange(len(load.options))
                now = load.options[served[i]]
            if not now.left_out:
                on_cpu = now.cpu_ready_s < inf and self.random.random() < 0.5
                (cpu if on_cpu else gpu).append(i)
        self.random.shuffle(gpu)
        settled = [load.options[served[i]] if i in served else load for i, load in enumerate(loads)]
        return replace(timed(settled, costs, gpu, cpu), served=served)


COSTS = SplitCosts(lambda n: 1.0 * n, lambda n: 2.0 * n, 1.0, 3.0, 0.5, (1.0, 0.8, 0.7), (1.0, 0.9, 0.5))


class Carrier:
    """Carries plans out in a random order of landing, and checks that what is computed with is there."""

    def __init__(self, manager: Manager, seed: int) -> None:
        self.manager = manager
        self.random = random.Random(seed)
        self.behind: list[Fetch] = []
        self.slots: dict[tuple[int, Tier], set[ExpertKey]] = {}
        """Whose bytes have a slot, as the transfer engine keeps them."""

    def run(self, event: RoutingEvent) -> LayerPlan:
        manager = self.manager
        for fetch in [fetch for fetch in self.behind if self.random.random() < 0.3]:
            self.land(fetch)
        plan = manager.step(event)
        assert plan.error is None
        self.behind += plan.prefetches
        for fetches in (plan.fetches, plan.prefetches, plan.late_fetches):  # as they are started
            for fetch in fetches:
                self.start(fetch)
        tier = manager.computing.tier
        for key in plan.resident:
            for slice_ in manager.stacks.precisions[plan.precision(key)]:
                assert manager.stacks.by_slice[slice_][0].state(key) is State.RESIDENT or any(
                    key in fetch.evicted.get(tier, ()) and fetch.slice == slice_ for fetch in plan.late_fetches
                )
        for key in plan.on_cpu:
            for slice_ in set(manager.stacks.precisions[plan.precision(key)]) - set(plan.waiting.get(key, ())):
                assert manager.stacks.by_slice[slice_][1].state(key) is State.RESIDENT
        landed: dict[ExpertKey, set[int]] = {}
        urgent = [*plan.fetches, *plan.late_fetches]
        for fetch in [f for f in self.behind if f.slice in plan.waiting.get(f.key, ())]:
            self.behind.remove(fetch)
            urgent.append(fetch)
        self.random.shuffle(urgent)
        for fetch in urgent:
            manager.arrived(fetch, manager.stacks.sizes[fetch.slice] if fetch.source is Tier.DISK else 0)
            landed.setdefault(fetch.key, set()).add(fetch.slice)
        for key, waits in plan.waiting.items():
            assert set(waits) <= landed[key]
            for slice_ in set(manager.stacks.precisions[plan.precision(key)]) - landed[key]:
                assert manager.stacks.by_slice[slice_][key in plan.on_cpu].state(key) is State.RESIDENT
        served = Counter([*plan.resident, *plan.waiting, *plan.skipped, *plan.in_place()])
        assert served == Counter(event.keys)
        manager.finish()
        for caches in manager.stacks.by_slice:
            for cache in caches:
                cache.check_integrity()
        return plan

    def start(self, fetch: Fetch) -> None:
        """Slots change hands, and there is one for each that is admitted."""
        for tier, victims in fetch.evicted.items():
            for victim in victims:
                self.slots[fetch.slice, tier].remove(victim)
        for cache in self.manager.stacks.by_slice[fetch.slice]:
            if cache.tier in fetch.admitted:
                held = self.slots.setdefault((fetch.slice, cache.tier), set())
                assert fetch.key not in held
                held.add(fetch.key)
                assert len(held) * self.manager.stacks.sizes[fetch.slice] <= cache.capacity_bytes

    def land(self, fetch: Fetch) -> None:
        self.behind.remove(fetch)
        if self.random.random() < 0.2:
            for tier in fetch.admitted:
                self.slots[fetch.slice, tier].remove(fetch.key)
            self.manager.failed(fetch)
        else:
            self.manager.arrived(fetch, self.manager.stacks.sizes[fetch.slice] if fetch.source is Tier.DISK else 0)

    def settle(self) -> None:
        for fetch in list(self.behind):
            self.land(fetch)
        self.manager.check_integrity()


def events(count: int, seed: int) -> Iterator[RoutingEvent]:
    rng = random.Random(seed)
    for step in range(count):
        for layer in range(LAYERS):
            experts = rng.sample(range(EXPERTS), rng.randrange(1, 6))
            weights = sorted(rng.random() + 0.01 for _ in experts)
            tokens = [rng.choice([1, 1, 2, 3]) for _ in experts]
            yield tiny.event(layer, experts, step, weights, tokens)


@pytest.mark.parametrize("precisions", [APART, NESTED, ((0, 1, 2), (0, 1), (0,)), ((0,), (1, 2), (1,))], ids=str)
@pytest.mark.parametrize("accelerator", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("slots", [1, 3, 9])
@pytest.mark.parametrize("ahead", [False, True], ids=["on-demand", "ahead"])
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
def test_every_member_is_served_whatever_a_fallback_and_a_scheduler_say(
    precisions: Sequence[Sequence[int]], accelerator: bool, slots: int, ahead: bool, divided: bool
) -> None:
    """Choices at random, landings at random, failures: all is computed with what is there, and the books balance."""
    count = 1 + max(slice_ for slices in precisions for slice_ in slices)
    tiers = {Tier.GPU: slots, Tier.CPU: 2 * slots} if accelerator else {Tier.CPU: slots}
    if divided and not accelerator:
        pytest.skip("there is nothing to divide")

    def made() -> Manager:
        prefetcher = Prefetcher(make_predictor("frequency", LAYERS, EXPERTS), 2, adaptive=False) if ahead else None
        if prefetcher is not None:
            prefetcher.pace = Pace({Phase.DECODE: 1.0}, {Phase.DECODE: 9.0}, {Tier.DISK: 1.0, Tier.CPU: 0.5})
        split = Split(Coin(), COSTS) if divided else None
        return manager_of(precisions, [tiers] * count, prefetcher=prefetcher, split=split)

    carrier = Carrier(made(), seed=slots)
    log: list[Any] = []
    carrier.manager.log = log
    totals: Counter[str] = Counter()
    for event in events(60, seed=slots):
        plan = carrier.run(event)
        totals.update(
            members=len(event.experts), skipped=len(plan.skipped), behind=len(plan.prefetches), on_cpu=len(plan.on_cpu)
        )
    carrier.settle()
    manager = carrier.manager
    stats = manager.stats[manager.computing.tier]
    assert stats.accesses == totals["members"] == sum(manager.serving.uses) + manager.serving.skipped
    assert manager.serving.skipped == totals["skipped"] > 0 and all(manager.serving.uses)
    assert totals["behind"] > 0 or slots == 1
    assert (totals["on_cpu"] > 0) == divided
    assert first_difference(log, made()) is None


def test_an_upgrade_moves_only_what_is_missing() -> None:
    class Low(Fallback):
        def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
            return [Choice(1 if event.step == 0 else 0) for _ in candidates]

    manager = manager_of(NESTED, [{Tier.CPU: 4}] * 2, Low(LAYERS, EXPERTS, 2))
    first = manager.step(tiny.event(0, [1, 2]))
    assert [(fetch.key, fetch.slice) for fetch in first.fetches] == [(K(0, 2), 0), (K(0, 1), 0)]
    for fetch in first.fetches:
        manager.arrived(fetch, 10)
    manager.finish()
    second = manager.step(tiny.event(0, [1, 3], step=1))
    assert [(fetch.key, fetch.slice) for fetch in second.fetches] == [(K(0, 3), 0), (K(0, 3), 1), (K(0, 1), 1)]
    assert second.waiting == {K(0, 1): [1], K(0, 3): [0, 1]} and second.precisions == {}
    assert manager.bytes_from_disk == 20 and manager.serving.uses == [2, 2]


def test_super_experts_are_neither_degraded_nor_evicted() -> None:
    class Lowest(Fallback):
        def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
            assert K(0, 0) not in [candidate.key for candidate in candidates]
            return [Choice(1) for _ in candidates]

    manager = manager_of(APART, [{Tier.CPU: 2}] * 2, Lowest(LAYERS, EXPERTS, 2), super_experts=[K(0, 0)])
    carrier = Carrier(manager, seed=0)
    plan = carrier.run(tiny.event(0, [0, 1]))
    assert plan.precision(K(0, 0)) == 0 and plan.precision(K(0, 1)) == 1
    for event in events(20, seed=1):
        if event.layer:
            carrier.run(event)
    assert manager.stacks.by_slice[0][0].state(K(0, 0)) is State.RESIDENT


class _Lower(Fallback):
    """Serves what is not there at the second precision."""

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(1) for _ in candidates]


def test_another_precision_says_nothing_of_a_prefetch() -> None:
    """Used, or evicted, at the lower one while the better is on its way, and taken back: it is none but cancelled."""
    prefetcher = Prefetcher(make_predictor("none", LAYERS, EXPERTS), 1, adaptive=False)
    prefetcher.predicts = True
    slots = [{Tier.CPU: 4}, {Tier.CPU: 1}]
    manager = manager_of([(0,), (1,)], slots, _Lower(LAYERS, EXPERTS, 2), prefetcher=prefetcher)
    ahead = Prediction(ExpertKey(1, 0), 0.9, 1)

    def carry_out(plan: LayerPlan) -> None:
        for fetch in (*plan.fetches, *plan.late_fetches):
            manager.arrived(fetch, 0)
        for fetch in plan.cancelled:
            manager.cancelled(fetch)
        manager.finish()

    for after in (tiny.event(1, [0]), tiny.event(0, [5])):
        plan = manager.step(tiny.event(1, [0]))  # has the lower precision's only place
        parcel = Parcel(ahead.key, 0, manager.stacks)
        assert parcel.find_room(())
        prefetcher._begin(plan, ahead, parcel)
        carry_out(plan)
        carry_out(manager.step(after))
    counts = manager.stats[Tier.CPU]
    assert (counts.cancelled_prefetches, counts.useful_prefetches, counts.wasted_prefetches) == (2, 0, 0)
    manager.check_integrity()


@pytest.mark.parametrize("choices", [[Choice(2)], [Choice(-2)], []], ids=str)
def test_what_a_fallback_may_not_say_is_an_error(choices: list[Choice]) -> None:
    class Wrong(Fallback):
        def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
            return choices

    manager = manager_of(APART, [{Tier.CPU: 2}] * 2, Wrong(LAYERS, EXPERTS, 2))
    plan = manager.step(tiny.event(0, [1]))
    assert isinstance(plan.error, PolicyError) and "fallback Wrong chose" in str(plan.error)
    manager.finish()
    manager.check_integrity()


# Live.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("mixed") / "model", "mixtral", torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def generated(model: OffloadedModel, steps: int = 24) -> torch.Tensor:
    output = model.generate(
        tiny.ids(2, 5), max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(output.logits)


@pytest.mark.parametrize("experts", ["bf16", "int8", "nf4", "int8>int4>int2", "int4", "int2"])
def test_where_experts_lie_makes_no_difference(checkpoint: Path, experts: str) -> None:
    """A quantised run is, bit for bit, the run of the same format with everything resident."""
    experts = "nested" if experts == "nested" else experts
    options: dict[str, Any] = {"experts": experts} | ({"fallback": "always_best:AlwaysBest"} if ">" in experts else {})
    with tiny.open_model(checkpoint, **options) as model:
        everything = generated(model)
        slot_bytes = sum(pool.slot_bytes for pool in model.plan.pools)
    for device in ("cpu", "emulated"):
        for slots in (0.5, 2, 5):
            with tiny.open_model(checkpoint, device=device, expert_cache=int(slots * slot_bytes), **options) as model:
                assert tiny.same_bits(generated(model), everything), (experts, device, slots)
                model.parts.runtime.manager.check_integrity()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_converted_at_the_models_own_precision_is_lossless(family: str, tmp_path: Path) -> None:
    """Records of bf16 give transformers' own bits, gates or none, transposed or not."""
    folder = tiny.save(tmp_path / family, family, torch.bfloat16)
    from offload.plan.conversion import convert_model

    convert_model(folder, PlanOptions(experts="bf16", expert_store=tmp_path / "store"))
    expected = tiny.resident(folder, torch.bfloat16)(tiny.ids(2, 9)).logits
    options = {"experts": "bf16", "expert_store": tmp_path / "store", "dtype": "bf16"}
    with tiny.open_model(folder, expert_cache="1K", **options) as model:
        assert type(model.parts.store.slices[0]).__name__ == "RecordSlice"
        assert tiny.same_bits(model(tiny.ids(2, 9)).logits, expected)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    ("experts", "fallback"),
    [
        ("auto,nf4", "hobbit(t1=.3)"),
        ("int8>int4", "hobbit(t1=.3)"),
        ("int8>int4>int2", "deadline"),
        ("auto,int4>int2", "hobbit(t1=.3, t2=.5, skip=True)"),
        ("auto,int8", "resident-low"),
        ("int8>int2", "resident-low"),
        ("auto,nf4", "adapmoe(threshold=.5)"),
        ("auto,nf4", "deadline"),
    ],
)
def test_fallbacks_live(checkpoint: Path, device: str, experts: str, fallback: str) -> None:
    """Every fallback, with caches too small for an event and larger: it answers, and says at which precision."""
    for share in (0.5, 4.0):
        with tiny.open_model(checkpoint, device=device, experts=experts, fallback=fallback) as model:
            cache = int(share * sum(pool.slot_bytes for pool in model.plan.pools))
        with tiny.open_model(
            checkpoint, device=device, experts=experts, fallback=fallback, expert_cache=cache
        ) as model:
            log = model.parts.runtime.manager.log = []
            assert generated(model).isfinite().all()
            model.parts.runtime.settle()
            stats = model.stats
            assert sum(stats.precision_uses.values()) == stats.tiers[stats.computing].counts.accesses
            assert sum(list(stats.precision_uses.values())[1:]) > 0, "nothing was degraded"
            for report in stats.tiers.values():
                assert report.peak_bytes <= report.capacity_bytes
            manager = model.parts.runtime.manager
            for caches in manager.stacks.by_slice:
                for each in caches:
                    each.check_integrity(idle=True)
            assert log


def test_a_fixed_choice_is_the_same_from_run_to_run(checkpoint: Path) -> None:
    options: dict[str, Any] = {"experts": "auto,nf4", "fallback": "hobbit(t1=.3)", "expert_cache": "20K"}
    runs = []
    for _ in range(2):
        with tiny.open_model(checkpoint, **options) as model:
            runs.append(generated(model))
    assert tiny.same_bits(*runs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": "auto,nf4"}, PolicyError, "a --fallback chooses among them"),
        ({"experts": "nf4", "fallback": "hobbit"}, PolicyError, 'such as "auto,nf4"'),
        ({"experts": "int8", "fallback": "hobbit"}, PolicyError, 'such as "int8,nf4"'),
        ({"experts": "auto,bf16", "fallback": "hobbit"}, FormatError, "own precision is named twice"),
        ({"experts": "fp4"}, FormatError, "choose one of"),
        ({"experts": "auto,nf4", "fallback": "hobit"}, PolicyError, "choose one of"),
        ({"experts": "auto,nf4", "fallback": "edgemoe"}, PolicyError, "run `offload calibrate` first"),
    ],
)
def test_what_means_nothing_is_refused(
    checkpoint: Path, options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny.open_model(checkpoint, **options)


def test_a_plan_divides_the_memory(checkpoint: Path) -> None:
    options = PlanOptions(cpu_mem="8G", device="cpu", context=64, experts="auto,nf4", fallback="hobbit(low_share=.5)")
    plan = make_plan(checkpoint, replace(options, expert_cache="120K", dtype="bf16"))
    high, low = plan.pools
    assert (high.name, low.name) == ("bf16", "nf4") and high.slot_bytes > low.slot_bytes
    assert (
        sum(pool.slot_bytes * pool.slots[Tier.CPU] for pool in plan.pools) == plan.cache_bytes[Tier.CPU] <= 120 * 1024
    )
    assert low.slots[Tier.CPU] > high.slots[Tier.CPU] > 0
    note = "--expert-store has no effect"
    assert not any(note in each for each in plan.notes)
    there = make_plan(checkpoint, PlanOptions(cpu_mem="8G", context=64, expert_store="there"))
    assert any(note in each for each in there.notes)
    whole = make_plan(checkpoint, replace(options, fallback="resident-low", expert_cache="1K"))
    assert whole.pools[1].slots[Tier.CPU] == whole.experts and whole.pools[0].slots[Tier.CPU] == 0
