"""Each scheduler on layers worked out by hand; the contract that all of them keep is in test_schedulers.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.costs.model import CostModel
from offload.decide.schedulers.base import Assignment, Costs, Load, make_scheduler, timed
from tests.cache.machines import MB, machine

COSTS = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 3.0 * n, copy_s=4.0)
LOADS = st.lists(st.tuples(st.integers(1, 5), st.booleans()).map(lambda parts: Load(*parts)), max_size=7)


def assigned(rule: str, loads: list[Load], costs: Costs = COSTS) -> Assignment:
    return make_scheduler(rule).assign(loads, costs)


def test_the_accelerator_alone_computes_arrivals_as_they_land() -> None:
    result = assigned("gpu-only", [Load(1, False), Load(1, True), Load(2, False), Load(3, True)])
    assert result.gpu == (3, 1, 2, 0) and result.copied == (2, 0) and result.cpu == ()
    assert result.makespan_s == 9.0  # copies land at 4 and 8, the last one is computed until 9


def test_residents_hide_copies() -> None:
    loads = [Load(1, True)] * 5 + [Load(1, False)]
    assert assigned("gpu-only", loads).makespan_s == 6.0
    assert assigned("gpu-only", [*loads[:-1], Load(1, True)]).makespan_s == 6.0


def test_an_expert_may_have_a_transfer_of_its_own() -> None:
    loads = [Load(1, False), Load(2, False, copy_s=0.5), Load(1, True, copy_s=9.0)]
    # The second lands at .5, while the resident is computed; the first lands at 4.5.
    assert assigned("gpu-only", loads) == Assignment((2, 1, 0), (), (1, 0), 5.5)


@given(LOADS)
def test_one_more_resident_never_costs_the_accelerator_time(loads: list[Load]) -> None:
    before = assigned("gpu-only", loads).makespan_s
    for i, load in enumerate(loads):
        with_it = [*loads[:i], load._replace(cached=True), *loads[i + 1 :]]
        assert assigned("gpu-only", with_it).makespan_s <= before


def test_the_cpu_computes_what_is_missing() -> None:
    costs = replace(COSTS, cpu_start_s=0.5)
    loads = [Load(1, False), Load(1, True), Load(2, False)]
    assert assigned("cpu-only", loads, costs) == Assignment((1,), (2, 0), (), 9.5)
    assert assigned("cpu-only", loads[1:2], costs).makespan_s == 1.0  # it need not start


def test_hybrimoe_gives_the_cpu_the_lightest_uncached_experts() -> None:
    loads = [Load(4, True), Load(1, False), Load(2, False)]
    # GPU takes the cached one until 1; the head (2 tokens) would be done at 5, the tail (1 token) on the CPU at 3;
    # then the head at 5 against 9 on the CPU.
    assert assigned("hybrimoe", loads) == Assignment((0, 2), (1,), (2,), 5.0)
    # The paper's three clocks start with one expert each, and the accelerator's second one lands at 4.
    assert assigned("hybrimoe(paper=True)", loads) == Assignment((0, 2), (1,), (2,), 5.0)


def test_hybrimoe_s_cpu_may_take_cached_experts() -> None:
    costs = replace(COSTS, gpu_s=lambda n: 2.0)
    # 0 on the GPU until 2 against 2 on the CPU until 3; 1 until 4, against 3; then 2 until 3 against 1 until 4.
    loads = [Load(3, True), Load(2, True), Load(1, True)]
    assert assigned("hybrimoe", loads, costs) == Assignment((0, 1), (2,), (), 4.0)
    assert assigned("hybrimoe(paper=True)", loads, costs) == Assignment((0, 1, 2), (), (), 6.0)


def test_hybrimoe_of_the_paper_takes_what_comes_next_however_long() -> None:
    heavy = [Load(5, False)]
    assert assigned("hybrimoe", heavy) == Assignment((0,), (), (0,), 5.0)
    assert assigned("hybrimoe(paper=True)", heavy) == Assignment((), (0,), (), 15.0)
    # The link takes the heaviest until 4 and the CPU the lightest until 3, then the last one, as it is free first.
    loads = [Load(4, False), Load(1, False), Load(5, False)]
    assert assigned("hybrimoe(paper=True)", loads) == Assignment((2,), (1, 0), (2,), 15.0)


def test_dali_begins_where_the_choice_matters_most() -> None:
    # The CPU's time less the accelerator's: 2, 1, -2, 4. The last is fetched and done at 5 (CPU: 9), the resident at 1
    # (3), the third on the CPU at 3 (9), the second fetched at 9 (3 + 6: a tie).
    loads = [Load(1, True), Load(2, False), Load(1, False), Load(3, False)]
    assert assigned("dali", loads) == Assignment((0, 3, 1), (2,), (3, 1), 9.0)


def test_dali_may_count_transfers_as_if_nothing_else_went_on() -> None:
    # The last is done at 5 as above, the resident then at 6 (CPU: 3), the third at 10 (6), the second at 10 (12).
    loads = [Load(1, True), Load(2, False), Load(1, False), Load(3, False)]
    assert assigned("dali(serial=True)", loads) == Assignment((3, 1), (0, 2), (3, 1), 9.0)


def test_dali_counts_the_cpu_s_start() -> None:
    assert assigned("dali", [Load(1, False)]).cpu == (0,)
    assert assigned("dali", [Load(1, False)], replace(COSTS, cpu_start_s=3.0)).gpu == (0,)


def test_monde_moves_as_many_of_the_most_tokens_as_make_both_sides_end_together() -> None:
    loads = [Load(n, False) for n in (1, 5, 2, 3)]
    # Moving none: 33 on the CPU. One: 5 against 18. Two: 9 against 9. Three: 13 against 3.
    assert assigned("monde", loads) == Assignment((1, 3), (0, 2), (1, 3), 9.0)
    # Residents come first, and never go to the CPU. Copies hide behind them, and two are moved as before.
    residents = [Load(1, True)] * 6
    assert assigned("monde", [*residents, *loads]) == Assignment((*range(6), 7, 9), (6, 8), (7, 9), 9.0)
    assert assigned("monde", residents).cpu == () and assigned("monde", []).makespan_s == 0.0


def test_monde_moves_nothing_where_the_cpu_is_done_sooner() -> None:
    assert assigned("monde", [Load(1, False), Load(1, True)]) == Assignment((1,), (0,), (), 3.0)
    # A start that is slow enough tips the balance; so do weights that the CPU waits for as long as the link.
    assert assigned("monde", [Load(1, False)], replace(COSTS, cpu_start_s=3.0)).gpu == (0,)
    assert assigned("monde", [Load(2, False, ready_s=9.0)]).gpu == (0,)


@given(LOADS)
def test_monde_has_the_best_of_all_counts(loads: list[Load]) -> None:
    order = sorted(range(len(loads)), key=lambda i: (not loads[i].cached, -loads[i].tokens))
    held = sum(load.cached for load in loads)
    splits = (timed(loads, COSTS, order[:n], order[n:]).makespan_s for n in range(held, len(loads) + 1))
    assert assigned("monde", loads).makespan_s == min(splits)


def test_ratio_splits_misses_as_the_speeds_are() -> None:
    costs = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 1.0 * n, copy_s=3.0)  # a quarter of the weights over the link
    loads = [Load(1, True), *(Load(n, False) for n in (1, 2, 3, 1, 1))]
    # Of five 1.25: the heaviest lands at 3; the CPU has the other five tokens.
    assert assigned("ratio", loads, costs) == Assignment((0, 3), (2, 1, 4, 5), (3,), 5.0)
    fetched = [len(assigned("ratio", [Load(1, False)] * missing, costs).copied) for missing in range(11)]
    assert fetched == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_ratio_wants_a_fast_cpu() -> None:
    costs = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 1.0 * n, copy_s=2.0)  # only twice as fast as the link
    loads = [Load(1, False)] * 4
    assert assigned("ratio", loads, costs).cpu == ()
    assert len(assigned("ratio(least=1.5)", loads, costs).copied) == 1


def test_optimal_fetches_in_johnson_s_order() -> None:
    costs = Costs(gpu_s=lambda n: 2.0, cpu_s=lambda n: 100.0, copy_s=3.0)
    # The short transfer first: computed from 1 to 3, the other one from 4 to 6. The other way round it would be 7.
    assert assigned("optimal", [Load(1, False), Load(1, False, copy_s=1.0)], costs) == Assignment(
        (1, 0), (), (1, 0), 6.0
    )


def test_optimal_finds_what_a_greedy_rule_misses() -> None:
    costs = Costs(gpu_s=lambda n: 1.0 * n, cpu_s=lambda n: 1.0 * n, copy_s=9.0)
    loads = [Load(n, True) for n in (3, 3, 2, 2, 2)]
    assert assigned("dali", loads, costs).makespan_s == 7.0
    assert assigned("optimal", loads, costs).makespan_s == 6.0  # the threes apart from the twos


def test_auto_changes_its_mind_for_a_margin() -> None:
    auto = make_scheduler("auto(rules=('gpu-only', 'cpu-only'), margin=0.2)")
    loads = [Load(1, False)]  # 3 s on the CPU

    def makespan_s(copy_s: float) -> float:
        return auto.assign(loads, replace(COSTS, copy_s=copy_s)).makespan_s

    assert makespan_s(1.0) == 2.0
    assert makespan_s(2.5) == 3.5  # the CPU would save a seventh
    assert makespan_s(4.0) == 3.0  # two fifths
    assert makespan_s(1.5) == 3.0  # the accelerator would save a sixth
    auto.reset()
    assert makespan_s(1.5) == 2.5


@pytest.mark.parametrize("tokens", [1, 4])
def test_costs_come_from_a_profile(tokens: int) -> None:
    model = CostModel(machine(), expert_bytes=10 * MB, dense_layer_s=0.0)
    costs = Costs.measured(model, cpu_start_s=1e-6)
    assert costs.cpu_s(tokens) == pytest.approx(1e-3)
    assert costs.gpu_s(1) == pytest.approx(0.1e-3) and costs.gpu_s(tokens) < 0.11e-3
    assert (costs.copy_s, costs.cpu_start_s) == (pytest.approx(6e-3), 1e-6)
