"""What every scheduler keeps where experts can be served in several ways, or are not yet where the CPU could."""

from __future__ import annotations

from math import inf

import by_hand
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.types import ExpertKey, Tier
from offload.decide.loads import SplitCosts
from offload.decide.plan import LayerPlan
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, make_scheduler, scheduler_names, timed
from offload.decide.split import Split
from offload.decide.stacks import Stacks

RULES = [*scheduler_names(), "dali(serial=True)", "hybrimoe(paper=True)", "ratio(least=0)"]
COSTS = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 3.0 * n, copy_s=4.0)
SECONDS = st.floats(0.1, 9)
ON_HOST = st.sampled_from([0.0, 2.0, inf])
K = ExpertKey


class AllOnCpu(Scheduler):
    """As somebody writes a rule who knows of no host memory."""

    def assign(self, loads: list[Load], costs: Costs) -> Assignment:  # type: ignore[override]
        return timed(loads, costs, (), range(len(loads)))


@st.composite
def served(draw: st.DrawFn) -> Load:
    """A load as a fallback chose it, with the better ways to serve it; it may be left out."""
    tokens, losses = draw(st.integers(1, 5)), sorted(draw(st.sets(st.floats(0, 1), min_size=1, max_size=3)))
    options = tuple(
        Load(tokens, draw(st.booleans()), copy_s=draw(SECONDS), host_s=draw(ON_HOST), loss=loss) for loss in losses[:-1]
    )
    if options and draw(st.booleans()):
        return Load(tokens, True, host_s=inf, loss=losses[-1], left_out=True, options=options)
    return Load(tokens, draw(st.booleans()), copy_s=1.0, host_s=draw(ON_HOST), loss=losses[-1], options=options)


def check(rule: Scheduler, loads: list[Load]) -> None:
    found = rule.serve(loads, COSTS)
    now = [load.options[found.served[i]] if i in found.served else load for i, load in enumerate(loads)]
    assert sorted(found.gpu + found.cpu) == [i for i, load in enumerate(now) if not load.left_out]
    assert all(now[i].cpu_ready_s < inf for i in found.cpu)
    assert all(now[i].loss < loads[i].loss for i in found.served)
    assert found.copied == tuple(i for i in found.gpu if not now[i].cached)
    assert found.makespan_s == timed(now, COSTS, found.gpu, found.cpu).makespan_s < inf


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40)
@given(loads=st.lists(served(), max_size=6))
def test_what_is_served_is_computed_once_where_it_can_be(rule: str, loads: list[Load]) -> None:
    check(make_scheduler(rule), loads)


@settings(max_examples=40)
@given(loads=st.lists(served(), max_size=6))
def test_a_rule_need_not_know_what_host_memory_has(loads: list[Load]) -> None:
    check(AllOnCpu(), loads)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_on_its_way_to_host_memory_goes_to_the_accelerator(rule: str) -> None:
    caches = [by_hand.cache_of(tier, 4, 64, 1, 4) for tier in (Tier.GPU, Tier.CPU)]
    for expert in (0, 1):
        caches[1].reserve(K(0, expert), 64)
    caches[1].commit(K(0, 1))
    slow = SplitCosts(gpu_s=lambda n: 1.0, cpu_s=lambda n: 0.1, copy_s=50.0, read_s=50.0, cpu_start_s=0.0)
    plan = LayerPlan(by_hand.event(0, [0, 1]))
    plan.waiting = {K(0, 0): (0,), K(0, 1): (0,)}
    order = Split(make_scheduler(rule), slow).divide(plan, Stacks.single(caches, 64))
    assert K(0, 0) in order and K(0, 0) not in plan.on_cpu and K(0, 0) in plan.waiting
