"""Expert buffering: what a batch does not use goes first, and of what it uses the last one in."""

from __future__ import annotations

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.types import ExpertKey, Phase, RoutingEvent, Tier

LAYERS, EXPERTS = 2, 8


class Layer:
    """One layer's cache of so many experts, and batches that use it."""

    def __init__(self, slots: int, policy: str = "expert-buffering", layer: int = 0) -> None:
        lanes = Lanes.per_layer(LAYERS, EXPERTS, slots)
        self.cache = ExpertCache(Tier.CPU, [slots] * LAYERS, make_policy(policy, lanes))
        self.layer = layer
        self.step = 0

    def batch(self, *experts: int) -> set[int]:
        """A pass uses `experts`, the last one with the most weight; gives what is resident after it."""
        n = len(experts)
        weights = tuple((i + 1) / n for i in range(n))
        event = RoutingEvent(0, self.step, self.layer, Phase.DECODE, experts, weights, (1,) * n)
        self.step += 1
        self.cache.policy.on_event(event)
        for key in self.cache.admit(event.keys, 1).admitted:
            self.cache.commit(key)
        return {expert for _, expert in self.cache.resident()}

    def hits(self, *experts: int) -> int:
        before = {expert for _, expert in self.cache.resident()}
        self.batch(*experts)
        return len(before & set(experts))


def test_what_the_batch_does_not_use_goes_before_what_it_uses() -> None:
    layer = Layer(3)
    assert layer.batch(5, 6, 7) == {5, 6, 7}
    assert layer.batch(0, 6) == {0, 5, 6}  # of 5 and 7, which are idle, 7 came in last
    assert layer.batch(1, 0) == {0, 1, 5}  # 6 came in before 0, which this batch uses


def test_of_a_batch_larger_than_the_buffer_the_first_executed_stay() -> None:
    layer = Layer(3)
    # Touched by weight: 0 has the least, yet runs first.
    assert layer.batch(0, 3, 1, 5, 4, 2) == {0, 1, 2}
    assert layer.hits(5, 4, 3, 2, 1, 0) == 3
    # Others keep what was touched last or came first, whichever number it has.
    for other in ("lru", "fifo", "lifo"):
        layer = Layer(3, other)
        assert layer.batch(0, 3, 1, 5, 4, 2) == {2, 4, 5}


def test_a_resident_of_the_batch_stays_for_one_that_runs_earlier() -> None:
    layer = Layer(2)
    assert layer.batch(6, 7) == {6, 7}
    assert layer.batch(0, 6, 7) == {6, 7}  # both were there before 0 came
    assert layer.batch(1, 2) == {1, 2}


def test_a_layer_of_a_shared_cache_comes_after_the_layers_before_it() -> None:
    cache = ExpertCache(Tier.CPU, [2], make_policy("expert-buffering", Lanes.shared(LAYERS, EXPERTS, 2)))
    for layer, expert in ((0, 7), (1, 0)):
        event = RoutingEvent(0, 0, layer, Phase.DECODE, (expert,), (1.0,), (1,))
        cache.policy.on_event(event)
        for key in cache.admit(event.keys, 1).admitted:
            cache.commit(key)
    event = RoutingEvent(0, 1, 0, Phase.DECODE, (1,), (1.0,), (1,))
    cache.policy.on_event(event)
    assert cache.admit(event.keys, 1).evicted == [ExpertKey(1, 0)]
