"""What is fetched ahead, what goes for it, what is taken back: by hand, with a predictor that is told what to say."""

from __future__ import annotations

from collections.abc import Sequence

import by_hand
import pytest

from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.manager import Manager
from offload.decide.pace import Pace
from offload.decide.plan import LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.stacks import Stacks
from predictors.base import Prediction, Predictor

K = ExpertKey
LAYERS, EXPERTS, SLOT = 3, 8, 64


class Told(Predictor):
    """Says `said`."""

    name = "told"
    said: Sequence[Prediction] = ()

    def observe(self, event: RoutingEvent) -> None:
        pass

    def predict(self, depth: int) -> list[Prediction]:
        return [prediction for prediction in self.said if prediction.lead_layers <= depth]


class Rig:
    """One tier of so many places, or two. A fetch takes a second, as does computing; there is time for nine fetches."""

    def __init__(self, *slots: int, depth: int = 1, policy: str = "lru") -> None:
        tiers = (Tier.CPU,) if len(slots) == 1 else (Tier.GPU, Tier.CPU)
        caches = [by_hand.cache_of(t, n, SLOT, LAYERS, EXPERTS, policy) for t, n in zip(tiers, slots, strict=True)]
        self.told = Told(LAYERS, EXPERTS)
        self.prefetcher = Prefetcher(self.told, depth, adaptive=False)
        self.prefetcher.pace = Pace({Phase.DECODE: 1.0}, {Phase.DECODE: 9.0}, dict.fromkeys(Tier, 1.0))
        self.manager = Manager(Stacks.single(caches, SLOT), prefetcher=self.prefetcher)

    def event(self, layer: int, expert: int, *said: Prediction) -> LayerPlan:
        """One event of one expert, after which `said` is expected; nothing that is fetched ahead lands."""
        self.told.said = said
        plan = self.manager.step(by_hand.event(layer, [expert]))
        assert plan.error is None
        for fetch in plan.fetches:
            self.manager.arrived(fetch, 0)
        self.manager.finish()
        return plan


@pytest.mark.parametrize(
    ("slots", "probability", "fetched"), [(3, 0.04, False), (3, 0.15, True), (2, 0.15, False), (2, 0.25, True)]
)
def test_a_free_place_costs_nothing_and_another_its_risk(slots: int, probability: float, fetched: bool) -> None:
    """At .15 a second's gain is .15, and the risk for what would go .85 of a quarter; at .25 that is .19."""
    rig = Rig(slots)
    rig.event(0, 1)
    rig.event(0, 0)
    plan = rig.event(0, 0, Prediction(K(1, 5), probability, 1))
    assert [fetch.key for fetch in plan.prefetches] == [K(1, 5)] * fetched
    assert all(fetch.evicted == ({Tier.CPU: [K(0, 1)]} if slots == 2 else {}) for fetch in plan.prefetches)


@pytest.mark.parametrize(
    ("asked_after", "probability", "fetched"), [(1, 0.25, False), (4, 0.25, False), (5, 0.25, True), (None, 0.18, True)]
)
def test_the_risk_is_learnt_by_what_became_of_those_that_went(
    asked_after: int | None, probability: float, fetched: bool
) -> None:
    """1 goes for a prefetch, and is asked for so many events later. Until a pass (three layers) is between, that was a
    regret, two in five now: .75 of .4 is more than .25. Else it is one in five, and .82 of .2 is less than .18."""
    rig = Rig(2)
    for expert in (1, 0):
        rig.event(0, expert)
    assert rig.event(0, 0, Prediction(K(1, 5), 0.18, 1)).prefetches == []
    (fetch,) = rig.event(0, 0, Prediction(K(1, 5), 0.25, 1)).prefetches
    assert fetch.evicted == {Tier.CPU: [K(0, 1)]}
    rig.manager.arrived(fetch, 0)
    for _ in range((asked_after or 6) - 1):
        rig.event(0, 0)
    if asked_after is not None:
        (missing,) = rig.event(0, 1).fetches
        assert missing.key == K(0, 1)
    plan = rig.event(0, 0, Prediction(K(2, 6), probability, 1))
    assert [fetch.key for fetch in plan.prefetches] == [K(2, 6)] * fetched
    assert all(fetch.evicted for fetch in plan.prefetches)


def test_what_is_expected_is_not_given_up_for_it() -> None:
    expected = Prediction(K(1, 0), 0.3, 1), Prediction(K(1, 5), 0.9, 1)
    for others, gone in (([], []), ([1], [{Tier.CPU: [K(1, 1)]}])):
        rig = Rig(2 + len(others))
        rig.event(1, 0)  # the least recently used of all
        for other in others:
            rig.event(1, other)
        rig.event(0, 0)
        assert [fetch.evicted for fetch in rig.event(0, 0, *expected).prefetches] == gone


def test_what_a_late_fetch_evicts_is_not_fetched_ahead() -> None:
    """1 takes the place of 3, a member worth less, once that is computed; until then RAM still has what goes there."""
    for evicted, ahead in ((K(1, 5), []), (K(1, 6), [K(1, 5)])):
        rig = Rig(2, 2, policy="stubborn_policy:Stubborn")  # low ids are worth more
        rig.prefetcher.pace.fetch_s = dict.fromkeys(Tier, 4.0)  # more than another expert's computation hides
        for cache, keys in zip(rig.manager.caches, ([K(0, 3), K(0, 2)], [evicted, K(1, 4)]), strict=True):
            for key in keys:
                cache.reserve(key, SLOT)
                cache.commit(key)
        rig.told.said = [Prediction(K(1, 5), 0.45, 1)]
        plan = rig.manager.step(by_hand.event(0, [3, 1]))
        assert [fetch.evicted for fetch in plan.late_fetches] == [{Tier.GPU: [K(0, 3)], Tier.CPU: [evicted]}]
        assert [fetch.key for fetch in plan.prefetches] == ahead


def test_where_it_is_copied_from_it_stays_until_it_has_arrived() -> None:
    rig = Rig(2, 2)
    ram = rig.manager.caches[1]
    ram.reserve(K(1, 5), SLOT)
    ram.commit(K(1, 5))
    (fetch,) = rig.event(0, 0, Prediction(K(1, 5), 0.9, 1)).prefetches
    assert fetch.source is Tier.CPU and ram.pinned() == [K(1, 5)]
    rig.manager.arrived(fetch, 0)
    assert ram.pinned() == []
    rig.manager.check_integrity()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_looks_as_far_as_its_depth(depth: int) -> None:
    plan = Rig(8, depth=depth).event(0, 0, *(Prediction(K(lead % 3, 5), 0.9, lead) for lead in (1, 2, 3)))
    assert [fetch.key.layer for fetch in plan.prefetches] == [1, 2, 0][:depth]


def test_it_is_taken_back_once_its_event_has_passed_and_not_before() -> None:
    rig = Rig(8, depth=3)
    (fetch,) = rig.event(0, 0, Prediction(K(2, 5), 0.9, 2)).prefetches
    assert rig.event(1, 0, Prediction(K(2, 5), 0.9, 1)).cancelled == []
    assert rig.event(2, 0, Prediction(K(2, 5), 0.9, 3)).cancelled == [fetch]  # though the next pass may need it
    assert rig.event(0, 0).cancelled == []  # once is enough


def test_it_is_taken_back_when_it_is_expected_no_more() -> None:
    rig = Rig(8, depth=2)
    (fetch,) = rig.event(0, 0, Prediction(K(2, 5), 0.9, 2)).prefetches
    assert rig.event(1, 0).cancelled == [fetch]


def test_it_is_not_taken_back_when_its_event_needs_it() -> None:
    rig = Rig(8)
    (fetch,) = rig.event(0, 0, Prediction(K(1, 5), 0.9, 1)).prefetches
    plan = rig.manager.step(by_hand.event(1, [5]))
    assert plan.awaited == [fetch.key] and plan.cancelled == [] and plan.fetches == []
