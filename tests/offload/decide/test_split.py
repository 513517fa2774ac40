"""Layers divided between accelerator and CPU: who computes what, and that nothing is given up in use."""

from __future__ import annotations

from typing import Any

import by_hand
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.residency import State
from cache.types import ExpertKey, Phase, Tier
from offload.decide.gain import Makespans
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.pace import PassTime
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.schedulers.base import make_scheduler, scheduler_names
from offload.decide.split import Split
from offload.decide.stacks import Stacks

RULES = [name for name in scheduler_names() if name != "optimal"] + ["optimal(limit=16)"]
LAYERS, EXPERTS, SLOT = 3, 8, 64
K = ExpertKey
EVEN = SplitCosts(gpu_s=lambda n: 1.0, cpu_s=lambda n: 1.5, copy_s=2.0, read_s=4.0, cpu_start_s=0.1)


def manager_of(gpu: int, cpu: int, rule: str, costs: SplitCosts = EVEN, policy: str = "lru") -> Manager:
    caches = [
        by_hand.cache_of(tier, n, SLOT, LAYERS, EXPERTS, policy) for tier, n in ((Tier.GPU, gpu), (Tier.CPU, cpu))
    ]
    return Manager(Stacks.single(caches, SLOT), split=Split(make_scheduler(rule), costs))


def carry_out(manager: Manager, plan: LayerPlan) -> None:
    for fetch in (*plan.fetches, *plan.late_fetches):
        manager.arrived(fetch, SLOT if fetch.source is Tier.DISK else 0)
    manager.finish()
    manager.check_integrity()


def keys(fetches: list[Fetch]) -> list[ExpertKey]:
    return [fetch.key for fetch in fetches]


def test_what_is_missing_is_computed_where_it_lies() -> None:
    manager = manager_of(1, 4, "cpu-only")
    plan = manager.step(by_hand.event(0, [0, 1, 2]))
    # One place on the accelerator is free: the heaviest of equals goes there. The others are read for the CPU.
    assert keys([fetch for fetch in plan.fetches if not fetch.to_host]) == [K(0, 2)]
    assert sorted(plan.on_cpu) == [K(0, 0), K(0, 1)] and plan.in_place() == []
    assert all(fetch.admitted == (Tier.CPU,) for fetch in plan.fetches if fetch.to_host)
    carry_out(manager, plan)

    plan = manager.step(by_hand.event(0, [0, 1, 2]))
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
        carry_out(manager, manager.step(by_hand.event(0, experts)))
    manager.split = Split(make_scheduler("hybrimoe"), costs)
    plan = manager.step(by_hand.event(0, [0, 1, 4, 5], tokens=[1, 9, 3, 1]))
    assert plan.on_cpu == [K(0, 0)] and keys(plan.fetches) == [K(0, 1)]
    assert sorted(plan.resident) == [K(0, 4), K(0, 5)]
    carry_out(manager, plan)


def test_what_both_have_may_go_to_the_cpu_and_what_only_the_accelerator_has_may_not() -> None:
    costs = SplitCosts(gpu_s=lambda n: 1.0, cpu_s=lambda n: 1.0, copy_s=2.0, read_s=4.0, cpu_start_s=0.0)
    for host, expected in ((8, 2), (0, 0)):
        manager = manager_of(4, host, "gpu-only", costs)
        carry_out(manager, manager.step(by_hand.event(0, [0, 1, 2, 3])))
        manager.split = Split(make_scheduler("dali"), costs)
        plan = manager.step(by_hand.event(0, [0, 1, 2, 3]))
        assert len(plan.on_cpu) == expected and len(plan.resident) == 4 - expected and not plan.fetches
        assert plan.in_place() == plan.on_cpu
        carry_out(manager, plan)
        assert manager.stats[Tier.GPU].hits == 4


def test_costs_follow_what_passes_took() -> None:
    split = Split(make_scheduler("cpu-only"), EVEN)
    stacks = Stacks.single([by_hand.cache_of(tier, 8, SLOT, LAYERS, EXPERTS) for tier in (Tier.GPU, Tier.CPU)], SLOT)
    for cache, experts in zip(stacks.caches, ([0, *range(3, 8), 8, 9], [0, 1, 2]), strict=True):
        for expert in experts:
            key = K(*divmod(expert, EXPERTS)) if expert >= EXPERTS else K(0, expert)
            cache.reserve(key, SLOT)
            cache.commit(key)
    plan = LayerPlan(by_hand.event(0, [0, 1, 2]))
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
            plan = manager.step(by_hand.event(layer, experts, step, tokens=tokens))
            fetches = (*plan.fetches, *plan.late_fetches)
            crossing = [fetch.key for fetch in fetches if not fetch.to_host]
            assert sorted([*plan.resident, *plan.on_cpu, *crossing]) == sorted(K(layer, e) for e in experts)
            for key in plan.in_place():
                assert manager.caches[1].state(key) is State.RESIDENT
            assert all(
                Tier.GPU not in fetch.admitted and fetch.source is Tier.DISK for fetch in fetches if fetch.to_host
            )
            carry_out(manager, plan)


def test_what_the_cpu_does_quickly_is_not_worth_a_prefetch() -> None:
    saved = []
    for cpu_s in (None, 8.0, 0.01):
        makespans = Makespans()
        makespans.cpu_s = cpu_s
        saved.append(makespans.saved_s(4, 2, 1.0, 5.0))
    assert saved[0] > saved[1] > saved[2] >= 0
