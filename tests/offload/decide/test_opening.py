"""The beginning of a pass: what is fetched before the first layer, by what the pass reads."""

from __future__ import annotations

from collections.abc import Sequence

import by_hand
import pytest

from cache.residency import State
from cache.types import ExpertKey, Opening, Phase, RoutingEvent, Tier, before_first
from offload.decide.log import Decision
from offload.decide.manager import Manager
from offload.decide.pace import Pace
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import make_rule
from offload.decide.stacks import Stacks
from predictors.base import Prediction, Predictor

K, P = ExpertKey, Prediction
LAYERS, EXPERTS = 4, 8


class Reader(Predictor):
    """Says what each pass needs by its first token: of token t the expert t in every layer."""

    name = "reader"
    reads = True

    def reset(self) -> None:
        super().reset()
        self._event: RoutingEvent | None = None
        self._expert = 0

    def begin(self, event: RoutingEvent) -> None:
        assert event.opening is not None and event.layer == -1 and not event.experts
        if event.opening.ids[0] == 99:
            raise ZeroDivisionError("of no token")
        self._event, self._expert = event, event.opening.ids[0]

    def observe(self, event: RoutingEvent) -> None:
        self._event = event

    def predict(self, depth: int) -> Sequence[Prediction]:  # type: ignore[override]
        if self._event is None:
            return []
        layers = range(self._event.layer + 1, min(self._event.layer + 1 + depth, LAYERS))
        return [P(K(layer, self._expert), 1.0, layer - self._event.layer) for layer in layers]


def manager_of(rule: str = "read-me", depth: int = LAYERS, slots: int = 8) -> Manager:
    cache = by_hand.cache_of(Tier.CPU, slots, 1, LAYERS, EXPERTS)
    prefetcher = Prefetcher(Reader(LAYERS, EXPERTS), depth, make_rule(rule), adaptive=False)
    prefetcher.pace = Pace({Phase.DECODE: 1.0}, {Phase.DECODE: 2.0}, dict.fromkeys(Tier, 1.0))
    return Manager(Stacks.single([cache], 1), prefetcher=prefetcher)


def opening(token: int, step: int = 0) -> RoutingEvent:
    return before_first(0, step, Phase.DECODE, Opening((token,)))


@pytest.mark.parametrize("rule", ["read-me", "ours", "moe-infinity"])
def test_what_a_pass_reads_brings_its_first_layer_before_it_begins(rule: str) -> None:
    manager = manager_of(rule)
    manager.log = log = []
    assert manager.listens
    plan = manager.begin(opening(3))
    assert plan.prefetches[0].key == K(0, 3) and not plan.fetches and plan.error is None
    assert manager.stats[Tier.CPU].prefetches == len(plan.prefetches)
    for fetch in plan.prefetches:
        manager.arrived(fetch, 1)
    first = manager.step(by_hand.event(0, [3]))
    assert first.resident == [K(0, 3)] and not first.fetches
    assert manager.stats[Tier.CPU].useful_prefetches == 1
    assert ([decision.event.layer for decision in log] == [-1, 0] and log[0] == Decision.of(plan)) or log[0].completions


def test_what_the_pass_before_expected_is_taken_back() -> None:
    manager = manager_of(depth=1)
    begun = manager.begin(opening(3)).prefetches
    plan = manager.begin(opening(5))
    assert [fetch.key for fetch in plan.cancelled] == [K(0, 3)] and plan.cancelled == begun
    assert [fetch.key for fetch in plan.prefetches] == [K(0, 5)]
    manager.cancelled(begun[0])
    assert manager.computing.state(K(0, 3)) is State.MISS


def test_the_books_are_right_when_reading_fails() -> None:
    manager = manager_of()
    plan = manager.begin(opening(99))
    assert isinstance(plan.error, ZeroDivisionError) and not plan.prefetches
    manager.finish()
    manager.check_integrity()


def test_nobody_is_told_of_what_no_predictor_asks_for() -> None:
    manager = manager_of()
    assert manager.prefetcher is not None
    manager.prefetcher.predictor.reads = False
    assert not manager.listens
    manager.prefetcher = None
    assert not manager.listens
