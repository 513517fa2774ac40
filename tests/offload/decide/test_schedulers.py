"""The contract that every scheduler keeps; each rule on layers worked out by hand is in test_scheduler.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import PolicyError
from offload.decide.schedulers.base import Assignment, Costs, Load, make_scheduler, scheduler_names, timed

RULES = [*scheduler_names(), "dali(serial=True)", "hybrimoe(paper=True)", "ratio(least=0)"]

seconds = st.floats(1e-3, 50)
LOADS = st.tuples(st.integers(1, 64), st.booleans(), st.none() | seconds).map(lambda parts: Load(*parts))
ON_DISK = st.tuples(st.integers(1, 64), st.just(False), st.none() | seconds, st.just(0.0) | seconds).map(
    lambda parts: Load(*parts)
)
LAYERS = st.lists(LOADS, max_size=7)


@st.composite
def costs(draw: st.DrawFn) -> Costs:
    gpu_fixed, gpu_each, cpu_fixed, cpu_each = (draw(seconds) for _ in range(4))
    return Costs(
        gpu_s=lambda tokens: gpu_fixed + gpu_each * tokens,
        cpu_s=lambda tokens: cpu_fixed + cpu_each * tokens,
        copy_s=draw(seconds),
        cpu_start_s=draw(st.just(0.0) | seconds),
    )


def critical_path(loads: Sequence[Load], costs: Costs, assignment: Assignment) -> float:
    """The makespan another way: the longest chain of things that wait for each other."""
    computing = [costs.gpu_s(loads[i].tokens) for i in assignment.gpu]
    crossing = [costs.copy_s if (own := loads[i].copy_s) is None else own for i in assignment.copied]
    chains = [sum(computing)]
    for number, i in enumerate(assignment.copied):
        chains.append(sum(crossing[: number + 1]) + sum(computing[assignment.gpu.index(i) :]))
    if assignment.cpu:
        chains.append(costs.cpu_start_s + sum(costs.cpu_s(loads[i].tokens) for i in assignment.cpu))
    return max(chains)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=50)
@given(loads=LAYERS, costs=costs())
def test_assignments_are_complete_possible_and_timed_right(rule: str, loads: list[Load], costs: Costs) -> None:
    found = make_scheduler(rule).assign(loads, costs)
    assert sorted(found.gpu + found.cpu) == list(range(len(loads)))
    assert found.copied == tuple(i for i in found.gpu if not loads[i].cached)
    assert found.makespan_s == pytest.approx(critical_path(loads, costs, found), rel=1e-12)
    assert found == timed(loads, costs, found.gpu, found.cpu)
    best = make_scheduler("optimal").assign(loads, costs)
    assert found.makespan_s >= best.makespan_s * (1 - 1e-12)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=50)
@given(loads=st.lists(ON_DISK, max_size=7), costs=costs())
def test_nothing_begins_before_it_is_read(rule: str, loads: list[Load], costs: Costs) -> None:
    found = make_scheduler(rule).assign(loads, costs)
    assert sorted(found.gpu + found.cpu) == list(range(len(loads)))
    for i in found.cpu:
        assert found.makespan_s >= (loads[i].ready_s + costs.cpu_s(loads[i].tokens)) * (1 - 1e-12)
    for i in found.gpu:
        crossed_s = loads[i].ready_s + costs.transfer_s(loads[i])
        assert found.makespan_s >= (crossed_s + costs.gpu_s(loads[i].tokens)) * (1 - 1e-12)
    assert found == timed(loads, costs, found.gpu, found.cpu)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=50)
@given(layers=st.lists(LAYERS, max_size=4), costs=costs())
def test_the_same_events_give_the_same_assignments(rule: str, layers: list[list[Load]], costs: Costs) -> None:
    first, second = make_scheduler(rule), make_scheduler(rule)
    said = [first.assign(loads, costs) for loads in layers]
    assert said == [second.assign(loads, costs) for loads in layers]
    first.reset()
    assert said == [first.assign(loads, costs) for loads in layers]


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=50)
@given(load=LOADS, count=st.integers(2, 8), costs=costs())
def test_ties_go_by_the_order_of_the_input(rule: str, load: Load, count: int, costs: Costs) -> None:
    found = make_scheduler(rule).assign([load] * count, costs)
    assert list(found.gpu) == sorted(found.gpu)
    assert list(found.cpu) in (sorted(found.cpu), sorted(found.cpu, reverse=True))  # from one end, or from the other


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_without_experts_takes_no_time(rule: str) -> None:
    costs = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 1.0, copy_s=1.0, cpu_start_s=1.0)
    assert make_scheduler(rule).assign([], costs) == Assignment((), (), (), 0.0)


def everything(loads: Sequence[Load], costs: Costs) -> Iterator[float]:
    """The makespans of all splits, all orders of transfers and all orders of computing."""
    for sides in product([True, False], repeat=len(loads)):
        gpu = [i for i, side in enumerate(sides) if side]
        on_cpu = [costs.cpu_s(loads[i].tokens) for i, side in enumerate(sides) if not side]
        cpu_s = costs.cpu_start_s + sum(on_cpu) if on_cpu else 0.0
        for sent in permutations(i for i in gpu if not loads[i].cached):
            landed_s, clock_s = {}, 0.0
            for i in sent:
                clock_s += costs.transfer_s(loads[i])
                landed_s[i] = clock_s
            for order in permutations(gpu):
                gpu_s = 0.0
                for i in order:
                    gpu_s = max(gpu_s, landed_s.get(i, 0.0)) + costs.gpu_s(loads[i].tokens)
                yield max(gpu_s, cpu_s)


@given(loads=st.lists(LOADS, max_size=3), costs=costs())
def test_optimal_is_the_best_of_everything(loads: list[Load], costs: Costs) -> None:
    best_s = min(everything(loads, costs))
    assert make_scheduler("optimal").assign(loads, costs).makespan_s == pytest.approx(best_s, rel=1e-12)


@given(loads=LAYERS, costs=costs())
def test_auto_is_the_best_of_the_rules(loads: list[Load], costs: Costs) -> None:
    auto = make_scheduler("auto")
    best_s = min(make_scheduler(rule).assign(loads, costs).makespan_s for rule in auto.params.rules)
    assert auto.assign(loads, costs).makespan_s == best_s


def test_optimal_refuses_a_layer_too_large_for_it() -> None:
    costs = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 3.0, copy_s=4.0)
    loads = [Load(1, False)] * 13
    with pytest.raises(PolicyError, match=r'"optimal" tries all splits of a layer, of 13 experts too many: .* 12 '):
        make_scheduler("optimal").assign(loads, costs)
    assert len(make_scheduler("optimal").assign(loads[:12], costs).cpu) > 0
    assert len(make_scheduler("optimal(limit=13)").assign(loads, costs).cpu) > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fastest", "no scheduler is called"),
        ("dali(speed=3)", "cannot take these parameters"),
        ("auto(rules=())", "a tuple of names is needed"),
        ("auto(rules='dali')", "a tuple of names is needed"),
        ("auto(rules=('auto(margin=0)',))", "one of its own rules"),
        ("auto(margin=1)", "margin is 1"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make_scheduler(spec)
