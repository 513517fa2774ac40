"""Experts at several precisions: what is served, fetched and counted, whatever a fallback and a scheduler say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import by_hand
import pytest
from logs import first_difference
from several_precisions import APART, COSTS, EXPERTS, LAYERS, NESTED, Carrier, Coin, K, events, manager_of

from cache.errors import PolicyError
from cache.residency import State
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.fallbacks.base import Candidate, Choice, Fallback
from offload.decide.manager import Manager
from offload.decide.pace import Pace
from offload.decide.parcel import Parcel
from offload.decide.plan import LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.split import Split
from predictors.base import Prediction, make_predictor


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
    for event in events(20, seed=slots):
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
    first = manager.step(by_hand.event(0, [1, 2]))
    assert [(fetch.key, fetch.slice) for fetch in first.fetches] == [(K(0, 2), 0), (K(0, 1), 0)]
    for fetch in first.fetches:
        manager.arrived(fetch, 10)
    manager.finish()
    second = manager.step(by_hand.event(0, [1, 3], step=1))
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
    plan = carrier.run(by_hand.event(0, [0, 1]))
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

    for after in (by_hand.event(1, [0]), by_hand.event(0, [5])):
        plan = manager.step(by_hand.event(1, [0]))  # has the lower precision's only place
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
    plan = manager.step(by_hand.event(0, [1]))
    assert isinstance(plan.error, PolicyError) and "fallback Wrong chose" in str(plan.error)
    manager.finish()
    manager.check_integrity()
