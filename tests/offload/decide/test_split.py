"""Layers divided between accelerator and CPU: the same bits whoever computes, and nothing is given up in use."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import first_difference, twin

import offload.engine.hook
from cache.errors import PolicyError, TransferError
from cache.residency import State
from cache.types import ExpertKey, Phase, Tier
from offload.decide.gain import Makespans
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.pace import PassTime
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, make_scheduler, scheduler_names, timed
from offload.decide.split import Split
from offload.decide.stacks import Stacks
from offload.device.emulated import EmulatedDevice
from offload.engine.host import HostWorker
from offload.model import OffloadedModel
from offload.options import PlanOptions
from offload.plan.prepare import make_plan

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

RULES = [name for name in scheduler_names() if name != "optimal"] + ["optimal(limit=16)"]
LAYERS, EXPERTS, SLOT = 3, 8, 64
K = ExpertKey
EVEN = SplitCosts(gpu_s=lambda n: 1.0, cpu_s=lambda n: 1.5, copy_s=2.0, read_s=4.0, cpu_start_s=0.1)


def manager_of(gpu: int, cpu: int, rule: str, costs: SplitCosts = EVEN, policy: str = "lru") -> Manager:
    caches = [tiny.cache_of(tier, n, SLOT, LAYERS, EXPERTS, policy) for tier, n in ((Tier.GPU, gpu), (Tier.CPU, cpu))]
    return Manager(Stacks.single(caches, SLOT), split=Split(make_scheduler(rule), costs))


def carry_out(manager: Manager, plan: LayerPlan) -> None:
    for fetch in (*plan.fetches, *plan.late_fetches):
        manager.arrived(fetch, SLOT if fetch.source is Tier.DISK else 0)
    manager.finish()
    manager.check_integrity()


def keys(fetches: list[Fetch]) -> list[ExpertKey]:
    return [fetch.key for fetch in fetches]


# Decisions by hand.


def test_what_is_missing_is_computed_where_it_lies() -> None:
    manager = manager_of(1, 4, "cpu-only")
    plan = manager.step(tiny.event(0, [0, 1, 2]))
    # One place on the accelerator is free: the heaviest of equals goes there. The others are read for the CPU.
    assert keys([fetch for fetch in plan.fetches if not fetch.to_host]) == [K(0, 2)]
    assert sorted(plan.on_cpu) == [K(0, 0), K(0, 1)] and plan.in_place() == []
    assert all(fetch.admitted == (Tier.CPU,) for fetch in plan.fetches if fetch.to_host)
    carry_out(manager, plan)

    plan = manager.step(tiny.event(0, [0, 1, 2]))
    assert plan.resident == [K(0, 2)] and plan.fetches == [] and sorted(plan.in_place()) == [K(0, 0), K(0, 1)]
    # What the CPU computes with must stay in host memory until the event is over.
    assert manager.caches[1].victims(K(1, 0), SLOT) == [] and manager.caches[1].evictable_bytes() == 0
    carry_out(manager, plan)
    assert manager.stats[Tier.GPU].on_cpu == 4 and manager.stats[Tier.GPU].misses == 5
    assert manager.stats[Tier.GPU].bytes_in == SLOT and manager.stats[Tier.CPU].bytes_in == 3 * SLOT


def test_the_scheduler_says_who_computes_and_in_which_order_is_copied() -> None:
    costs = SplitCosts(gpu_s=lambda n: n, cpu_s=lambda n: 10.0 * n, copy_s=2.0, read_s=50.0, cpu_start_s=0.0)
    manager = manager_of(2, 8, "gpu-only", costs)
    for experts in ([0, 1], [2, 3], [4, 5]):
        carry_out(manager, manager.step(tiny.event(0, experts)))
    manager.split = Split(make_scheduler("hybrimoe"), costs)
    plan = manager.step(tiny.event(0, [0, 1, 4, 5], tokens=[1, 9, 3, 1]))
    assert plan.on_cpu == [K(0, 0)] and keys(plan.fetches) == [K(0, 1)]
    assert sorted(plan.resident) == [K(0, 4), K(0, 5)]
    carry_out(manager, plan)


def test_what_both_have_may_go_to_the_cpu_and_what_only_the_accelerator_has_may_not() -> None:
    costs = SplitCosts(gpu_s=lambda n: 1.0, cpu_s=lambda n: 1.0, copy_s=2.0, read_s=4.0, cpu_start_s=0.0)
    for host, expected in ((8, 2), (0, 0)):
        manager = manager_of(4, host, "gpu-only", costs)
        carry_out(manager, manager.step(tiny.event(0, [0, 1, 2, 3])))
        manager.split = Split(make_scheduler("dali"), costs)
        plan = manager.step(tiny.event(0, [0, 1, 2, 3]))
        assert len(plan.on_cpu) == expected and len(plan.resident) == 4 - expected and not plan.fetches
        assert plan.in_place() == plan.on_cpu
        carry_out(manager, plan)
        assert manager.stats[Tier.GPU].hits == 4


def test_costs_follow_what_passes_took() -> None:
    split = Split(make_scheduler("cpu-only"), EVEN)
    stacks = Stacks.single([tiny.cache_of(tier, 8, SLOT, LAYERS, EXPERTS) for tier in (Tier.GPU, Tier.CPU)], SLOT)
    for cache, experts in zip(stacks.caches, ([0, *range(3, 8), 8, 9], [0, 1, 2]), strict=True):
        for expert in experts:
            key = K(*divmod(expert, EXPERTS)) if expert >= EXPERTS else K(0, expert)
            cache.reserve(key, SLOT)
            cache.commit(key)
    plan = LayerPlan(tiny.event(0, [0, 1, 2]))
    plan.resident, plan.waiting = [K(0, 0)], {K(0, 1): (0,), K(0, 2): (0,)}
    split.divide(plan, stacks)
    assert sorted(plan.on_cpu) == [K(0, 1), K(0, 2)] == plan.in_place()[::-1] and plan.resident == [K(0, 0)]
    # Three seconds were expected of the CPU and one of the accelerator: it took twice, and half as long.
    split.passed(PassTime(Phase.DECODE, 9.0, 1.0, 0.0, 3, 1, 2, 12.0, 4, 4.0, expert_s=0.5, host_s=6.0))
    assert split.costs.cpu_s(1) == pytest.approx(1.5 * 1.2) and split.costs.gpu_s(1) == pytest.approx(0.9)
    assert split.costs.copy_s == pytest.approx(2.0 - 0.2) and split._read_s == pytest.approx(4.0 + 0.4)
    # Nothing expected, nothing told: nothing changes.
    split.passed(PassTime(Phase.DECODE, 9.0, 1.0, 0.0, 3, 0, 0, 0.0, 0, 0.0, expert_s=0.5, host_s=6.0))
    assert split.costs.cpu_s(1) == pytest.approx(1.5 * 1.2)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rule=st.sampled_from(RULES), gpu=st.integers(0, 6), cpu=st.integers(0, 10))
def test_every_member_is_computed_once_from_where_its_bytes_are(data: Any, rule: str, gpu: int, cpu: int) -> None:
    second = st.floats(0.01, 10)
    each, other = data.draw(second), data.draw(second)
    costs = SplitCosts(lambda n: each * n, lambda n: other * n, data.draw(second), data.draw(second), data.draw(second))
    manager = manager_of(gpu, cpu, rule, costs, data.draw(st.sampled_from(["lru", "lfru", "mrs"])))
    for step in range(data.draw(st.integers(1, 6))):
        for layer in range(LAYERS):
            experts = data.draw(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=6, unique=True))
            tokens = data.draw(st.lists(st.integers(1, 20), min_size=len(experts), max_size=len(experts)))
            plan = manager.step(tiny.event(layer, experts, step, tokens=tokens))
            fetches = (*plan.fetches, *plan.late_fetches)
            crossing = [fetch.key for fetch in fetches if not fetch.to_host]
            assert sorted([*plan.resident, *plan.on_cpu, *crossing]) == sorted(K(layer, e) for e in experts)
            for key in plan.in_place():
                assert manager.caches[1].state(key) is State.RESIDENT
            assert all(
                Tier.GPU not in fetch.admitted and fetch.source is Tier.DISK for fetch in fetches if fetch.to_host
            )
            carry_out(manager, plan)


# Live.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("split"), "mixtral", num_hidden_layers=LAYERS, num_local_experts=EXPERTS)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Any:
    return tiny.resident(checkpoint)


def open_model(checkpoint: Path, scheduler: str, gpu: int = 4, **kwargs: Any) -> OffloadedModel:
    return tiny.open_model(
        checkpoint, device="emulated", scheduler=scheduler, expert_cache=gpu * 4 * 3 * 64 * 32 + 999, **kwargs
    )


def small_host(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Host memory has room for so many experts only: a budget cannot be so exact."""
    from offload.plan.budgets import Plan

    original = Plan.slots
    monkeypatch.setattr(
        Plan, "slots", lambda plan, tier, slice_=0: slots if tier is Tier.CPU else original(plan, tier, slice_)
    )


@pytest.mark.parametrize("slots", [LAYERS * EXPERTS, 3, 0])
@pytest.mark.parametrize("rule", RULES)
def test_the_bits_are_those_of_the_resident_model(
    checkpoint: Path, expected: Any, monkeypatch: pytest.MonkeyPatch, rule: str, slots: int
) -> None:
    small_host(monkeypatch, slots)
    ids, mask = tiny.ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        logits = expected(ids, attention_mask=mask).logits
    prompt = tiny.ids(1, 40, seed=3)
    wanted = expected.generate(prompt, max_new_tokens=30, do_sample=False, prefill_chunk_size=16)
    with open_model(checkpoint, rule) as model:
        for _ in range(2):
            assert tiny.same_bits(model(ids, attention_mask=mask).logits, logits)
            assert torch.equal(
                model.generate(prompt, max_new_tokens=30, do_sample=False, prefill_chunk_size=16), wanted
            )
        stats = model.stats.as_dict()
        assert (stats["on_cpu"] > 0) == (rule != "gpu-only")
        model.parts.runtime.manager.check_integrity()


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "granitemoehybrid"])
def test_families_with_biases_and_shared_experts(tmp_path: Path, family: str) -> None:
    folder = tiny.save(tmp_path, family)
    resident = tiny.resident(folder)
    ids = tiny.ids(1, 12)
    wanted = resident.generate(ids, max_new_tokens=20, do_sample=False)
    with tiny.open_model(folder, device="emulated", scheduler="cpu-only") as model:
        slot = model.plan.slot_bytes
    with tiny.open_model(folder, device="emulated", scheduler="cpu-only", expert_cache=2 * slot) as model:
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), wanted)
        assert model.stats.as_dict()["on_cpu"] > 0


@pytest.mark.parametrize("rule", ["auto", "cpu-only", "dali"])
@pytest.mark.parametrize("slots", [LAYERS * EXPERTS, 4])
def test_a_live_run_is_decided_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rule: str, slots: int) -> None:
    small_host(monkeypatch, slots)
    with open_model(checkpoint, rule) as model:
        manager = model.parts.runtime.manager
        manager.log = log = []
        model.generate(tiny.ids(1, 9), max_new_tokens=15, do_sample=False)
        model.generate(tiny.ids(2, 20), max_new_tokens=5, do_sample=False)
        split = manager.split
        assert split is not None
        assert sum(len(decision.on_cpu) for decision in log) > 0
        assert first_difference(log, twin(manager, model.rules)) is None


def delayed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every worker dawdles: the readers, the link, the CPU's thread and the accelerator."""
    dice = random.Random(seed)

    def dawdle(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(dice.random() * 4e-4)
            return original(*args, **kwargs)

        return call

    from offload.store.plain import CheckpointReader

    monkeypatch.setattr(CheckpointReader, "read", dawdle(CheckpointReader.read))
    monkeypatch.setattr(EmulatedDevice, "copy", dawdle(EmulatedDevice.copy))
    monkeypatch.setattr(HostWorker, "_run", dawdle(HostWorker._run))
    monkeypatch.setattr(offload.engine.hook, "compute_expert", dawdle(offload.engine.hook.compute_expert))


@pytest.mark.parametrize("rule", ["auto", "hybrimoe", "cpu-only"])
@pytest.mark.parametrize(
    ("runs", "tokens"), [(3, 24), pytest.param(20, 256, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_delays_change_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rule: str, runs: int, tokens: int
) -> None:
    small_host(monkeypatch, 6)
    prompt = tiny.ids(1, 11)
    found = []
    for seed in range(runs):
        with monkeypatch.context() as patch:
            delayed(patch, seed)
            with open_model(checkpoint, rule, context=300) as model:
                generated = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        found.append(generated)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("slots", [LAYERS * EXPERTS, 5])
@pytest.mark.parametrize("rule", ["auto", "cpu-only"])
def test_prefetching_beside_a_divided_layer(
    checkpoint: Path, expected: Any, monkeypatch: pytest.MonkeyPatch, rule: str, slots: int
) -> None:
    small_host(monkeypatch, slots)
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=60, min_new_tokens=60, do_sample=False)
    with open_model(checkpoint, rule, gpu=6, predictor="cross-layer-gate", prefetch_depth=2) as model:
        prefetcher = model.parts.runtime.manager.prefetcher
        assert prefetcher is not None
        prefetcher.switch = None
        for _ in range(2):
            assert torch.equal(model.generate(prompt, max_new_tokens=60, min_new_tokens=60, do_sample=False), wanted)
        assert model.stats.as_dict()["on_cpu"] > 0
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()


def test_what_the_cpu_does_quickly_is_not_worth_a_prefetch() -> None:
    saved = []
    for cpu_s in (None, 8.0, 0.01):
        makespans = Makespans()
        makespans.cpu_s = cpu_s
        saved.append(makespans.saved_s(4, 2, 1.0, 5.0))
    assert saved[0] > saved[1] > saved[2] >= 0


def test_the_cpus_share_has_its_place_in_the_plan(checkpoint: Path) -> None:
    def share(**given: Any) -> int:
        plan = make_plan(checkpoint, PlanOptions(device="emulated", gpu_mem="1G", cpu_mem="3G", **given))
        items = {item.what: item for item in plan.items if item.tier is Tier.CPU}
        assert ("the CPU's share" in items) == bool(given)
        return items["the CPU's share"].nbytes // plan.chunk if given else 0

    assert share() == 0
    # Of a token: two experts' rows in and out, 64 numbers each, and three times what one expert has in between.
    assert share(scheduler="auto") == share(preset="hybrimoe") == 4 * (2 * 2 * 64 + 3 * 192)


def test_schedulers_change_between_calls(checkpoint: Path, expected: Any) -> None:
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(checkpoint, "gpu-only") as model:
        for rule in ("gpu-only", "cpu-only", "auto", "gpu-only", "dali(serial=True)"):
            model.use_scheduler(rule)
            model.reset_stats()
            assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)
            if rule == "cpu-only":
                assert model.stats.as_dict()["on_cpu"] > 0
            if rule == "gpu-only":
                assert model.stats.as_dict()["on_cpu"] == 0
            assert model.rules.scheduler == rule
    with pytest.raises(RuntimeError, match="closed"):
        model.use_scheduler("auto")


def test_a_failure_beside_the_accelerator_is_raised_and_the_next_reply_is_right(
    checkpoint: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(checkpoint, "cpu-only") as model:
        model.generate(prompt, max_new_tokens=8, do_sample=False)
        with monkeypatch.context() as patch:
            patch.setattr(offload.engine.hook._Beside, "job", lambda self, expert, weights: lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                model.generate(prompt, max_new_tokens=8, do_sample=False)
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


def test_a_read_for_the_cpu_that_fails_is_raised(
    checkpoint: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.store.plain import CheckpointReader

    small_host(monkeypatch, 2)
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(checkpoint, "cpu-only") as model:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        with monkeypatch.context() as patch:

            def fail(*args: Any) -> int:
                raise OSError("gone")

            patch.setattr(CheckpointReader, "read", fail)
            with pytest.raises(TransferError, match="gone"):
                model.generate(prompt, max_new_tokens=8, do_sample=False)
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


def test_work_that_cannot_be_prepared_leaves_every_slot_free(
    checkpoint: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as where host memory has no room for the rows. What was read for the CPU is in a staging slot here."""
    small_host(monkeypatch, 0)
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(checkpoint, "cpu-only") as model:
        with monkeypatch.context() as patch:
            patch.setattr(offload.engine.hook._Beside, "job", lambda *_: 1 // 0)
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    model.generate(prompt, max_new_tokens=8, do_sample=False)
        (staging,) = model.parts.runtime.engine._host_staging
        assert staging.qsize() == model.plan.places
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


class _Wrong(Scheduler):
    """Assigns as it is told to."""

    name = "wrong"

    def __init__(self, answer: Callable[[Sequence[Load]], tuple[Sequence[int], Sequence[int]]]) -> None:
        super().__init__()
        self.answer = answer

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        return timed(loads, costs, *self.answer(loads))


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda loads: (range(1, len(loads)), ()), PolicyError, "scheduler _Wrong gave .* goes to one of them"),
        (lambda loads: (range(len(loads)), [0]), PolicyError, "scheduler _Wrong gave .* goes to one of them"),
        (lambda loads: ((), range(len(loads))), PolicyError, "that host memory will not have"),
        (lambda loads: 1 // 0, ZeroDivisionError, "zero"),
    ],
    ids=["left out", "twice", "not there", "fails"],
)
def test_what_no_scheduler_may_say_is_refused_and_the_next_reply_is_right(
    checkpoint: Path,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
    error: type[Exception],
    words: str,
) -> None:
    small_host(monkeypatch, 0)
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(checkpoint, "dali") as model:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        split = model.parts.runtime.manager.split
        assert split is not None
        scheduler, split.scheduler = split.scheduler, _Wrong(answer)
        with pytest.raises(error, match=words):
            model.generate(prompt, max_new_tokens=8, do_sample=False)
        split.scheduler = scheduler
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scheduler": "nobody"}, "no scheduler is called"),
        ({"scheduler": "ratio(most=2)"}, "cannot take these parameters"),
        ({"scheduler": "auto", "device": "cpu"}, "the CPU computes everything"),
    ],
)
def test_what_cannot_be_divided_is_refused(checkpoint: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        tiny.open_model(checkpoint, **({"device": "emulated"} | arguments))


# The worker.


@pytest.fixture
def worker() -> Iterator[HostWorker]:
    worker = HostWorker(EmulatedDevice(1e9), threads=1)
    yield worker
    worker.close()


def test_jobs_run_in_order_and_errors_come_with_join(worker: HostWorker) -> None:
    done: list[int] = []
    worker.start(lambda: done.append(1))
    worker.start(lambda: 1 // 0, after=lambda: done.append(2))
    worker.start(lambda: done.append(3))
    assert worker.started == 3
    with pytest.raises(ZeroDivisionError):
        worker.join()
    assert done == [1, 2, 3] and worker.started == 0 and worker.busy_s > 0
    worker.join()


def test_whatever_ends_a_job_the_thread_goes_on(worker: HostWorker) -> None:
    def leave() -> None:
        raise SystemExit

    worker.start(leave)
    worker.start(lambda: None, after=lambda: 1 // 0)
    with pytest.raises(SystemExit):
        worker.join()
    worker.start(lambda: None)
    worker.join()
