"""The ring: whole layers ahead, in their order, into the places of those that have been computed."""

from __future__ import annotations

from collections.abc import Iterator

import by_hand
import pytest

from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.types import ExpertKey, Phase, Tier
from offload.decide.manager import Manager
from offload.decide.pace import Pace
from offload.decide.plan import LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import make_rule
from offload.decide.rules import Rules, depth_of
from offload.decide.stacks import Stacks
from predictors.base import make_predictor

LAYERS, EXPERTS = 5, 4


class Machine:
    """A cache of so many layers' room, whose transfers all land before the next layer."""

    def __init__(self, room: int, rule: str = "ring(layers=3)", policy: str = "fifo") -> None:
        slots = room * EXPERTS
        self.cache = ExpertCache(Tier.CPU, [slots], make_policy(policy, Lanes.shared(LAYERS, EXPERTS, slots)))
        made = make_rule(rule)
        predictor = make_predictor("every", LAYERS, EXPERTS)
        prefetcher = Prefetcher(predictor, depth_of(made, None, LAYERS), made, adaptive=False)
        prefetcher.pace = Pace({Phase.DECODE: 1.0}, {Phase.DECODE: 9.0}, dict.fromkeys(Tier, 1.0))
        self.manager = Manager(Stacks.single([self.cache], 1), prefetcher=prefetcher)

    def passes(self, count: int) -> Iterator[LayerPlan]:
        for step in range(count):
            for layer in range(LAYERS):
                plan = self.manager.step(by_hand.event(layer, [step % EXPERTS, (step + 1) % EXPERTS], step))
                assert plan.error is None
                for fetch in (*plan.fetches, *plan.late_fetches, *plan.prefetches):
                    self.manager.arrived(fetch, 0)
                self.manager.finish()
                yield plan

    def held(self) -> dict[int, int]:
        """How many experts of each layer are there."""
        layers = [key.layer for key in self.cache.resident()]
        return {layer: layers.count(layer) for layer in sorted(set(layers))}


def test_layers_come_whole_and_in_their_order_whatever_was_routed() -> None:
    plan = next(Machine(3).passes(1))
    assert [fetch.key for fetch in plan.prefetches] == [ExpertKey(1 + i // 4, i % 4) for i in range(8)]


def test_the_next_layer_takes_the_places_of_what_has_been_computed() -> None:
    machine = Machine(3)
    for plan in machine.passes(4):
        layer = plan.event.layer
        ahead = [(layer + i) % LAYERS for i in (1, 2)]
        assert all(machine.held()[each] == EXPERTS for each in ahead)
        if plan.event.step or layer > 2:
            assert not plan.fetches, "everything was there before its router spoke"
            # One layer a layer: what comes into reach, for what went out of it.
            assert {fetch.key.layer for fetch in plan.prefetches} == {ahead[1]}
            gone = {key.layer for fetch in plan.prefetches for key in fetch.evicted.get(Tier.CPU, ())}
            assert gone <= {layer, (layer - 1) % LAYERS}


def test_a_smaller_cache_has_the_nearest_layers() -> None:
    machine = Machine(2)
    for plan in machine.passes(2):
        assert machine.held()[(plan.event.layer + 1) % LAYERS] == EXPERTS
        assert len(machine.cache.resident()) <= 2 * EXPERTS


def test_a_longer_ring_reaches_farther() -> None:
    plan = next(Machine(4, "ring(layers=4)").passes(1))
    assert {fetch.key.layer for fetch in plan.prefetches} == {1, 2, 3}
    assert depth_of(make_rule("ring(layers=4)"), None, 24) == 3
    with pytest.raises(PolicyError, match="cannot take these parameters"):
        make_rule("ring(layers=1)")
    with pytest.raises(PolicyError, match="--prefetcher ring does nothing without a --predictor"):
        Rules(prefetcher="ring")
