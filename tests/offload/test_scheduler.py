"""Assignments of a layer's experts: hand-computed, and never worse than they claim."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler import Costs, Load, simulate

COSTS = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 3.0 * n, copy_s=4.0)
LOADS = st.lists(st.builds(Load, st.integers(1, 5), st.booleans()), max_size=7)


def test_the_accelerator_alone_computes_arrivals_as_they_land() -> None:
    loads = [Load(1, False), Load(1, True), Load(2, False), Load(3, True)]
    result = simulate(loads, COSTS, "gpu-only")
    assert result.gpu == (3, 1, 2, 0) and result.copied == (2, 0) and result.cpu == ()
    assert result.makespan_s == 9.0  # copies land at 4 and 8, the last one is computed until 9


def test_residents_hide_copies() -> None:
    loads = [Load(1, True)] * 5 + [Load(1, False)]
    assert simulate(loads, COSTS, "gpu-only").makespan_s == 6.0
    assert simulate([*loads[:-1], Load(1, True)], COSTS, "gpu-only").makespan_s == 6.0


def test_the_cpu_alone() -> None:
    costs = Costs(gpu_s=COSTS.gpu_s, cpu_s=COSTS.cpu_s, copy_s=4.0, cpu_start_s=0.5)
    result = simulate([Load(1, True), Load(2, False)], costs, "cpu-only")
    assert (result.gpu, result.cpu, result.copied, result.makespan_s) == ((), (1, 0), (), 9.5)


def test_hybrimoe_gives_the_cpu_the_lightest_uncached_experts() -> None:
    loads = [Load(4, True), Load(1, False), Load(2, False)]
    # GPU takes the cached one until 1; the head (2 tokens) would be done at 5, the tail (1 token) on the CPU at 3;
    # then the head at 5 against 9 on the CPU.
    result = simulate(loads, COSTS, "hybrimoe")
    assert (result.gpu, result.cpu, result.copied, result.makespan_s) == ((0, 2), (1,), (2,), 5.0)


@given(LOADS)
def test_every_expert_is_computed_once(loads: list[Load]) -> None:
    for rule in ("gpu-only", "cpu-only", "hybrimoe"):
        result = simulate(loads, COSTS, rule)  # type: ignore[arg-type]
        assert sorted(result.gpu + result.cpu) == list(range(len(loads)))
        assert set(result.copied) == {i for i in result.gpu if not loads[i].cached}


@given(LOADS)
def test_one_more_resident_never_costs_the_accelerator_time(loads: list[Load]) -> None:
    before = simulate(loads, COSTS, "gpu-only").makespan_s
    for i, load in enumerate(loads):
        with_it = [*loads[:i], load._replace(cached=True), *loads[i + 1 :]]
        assert simulate(with_it, COSTS, "gpu-only").makespan_s <= before


@pytest.mark.parametrize("copy_s", [0.5, 4.0, 50.0])
def test_hybrimoe_stays_near_the_best_split(copy_s: float) -> None:
    costs = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 2.0 * n, copy_s=copy_s)
    for cached in product([True, False], repeat=4):
        loads = [Load(n, c) for n, c in zip((3, 2, 1, 1), cached, strict=True)]
        best = min(
            max(
                simulate([loads[i] for i in range(4) if side[i]], costs, "gpu-only").makespan_s,
                simulate([loads[i] for i in range(4) if not side[i]], costs, "cpu-only").makespan_s,
            )
            for side in product([True, False], repeat=4)
        )
        assert best <= simulate(loads, costs, "hybrimoe").makespan_s <= 2 * best
