"""What every tier holds of every expert, slice by slice."""

from __future__ import annotations

import by_hand

from cache.residency import State
from cache.types import ExpertKey, Tier
from offload.decide.stacks import Stacks

KEY = ExpertKey(0, 1)


def held(*slices: int) -> Stacks:
    """Three precisions of a slice each, of which the computing tier holds `slices` of one expert."""
    caches = [[by_hand.cache_of(Tier.CPU, 2, 10 * (i + 1), 1, 4)] for i in range(3)]
    stacks = Stacks(caches, [10, 20, 30], [(0,), (1,), (2,)])
    for slice_ in slices:
        stacks.by_slice[slice_][0].reserve(KEY, stacks.sizes[slice_])
        stacks.by_slice[slice_][0].commit(KEY)
    return stacks


def test_the_best_precision_that_is_held_is_the_first_from_the_target_down() -> None:
    stacks = held(1, 2)
    assert [stacks.best(KEY, target) for target in (0, 1, 2)] == [1, 1, 2]
    assert held(2).best(KEY, 0) == 2 and held().best(KEY, 0) is None


def test_a_precision_stands_where_its_furthest_slice_does() -> None:
    caches = [[by_hand.cache_of(Tier.CPU, 2, 10, 1, 4)] for _ in range(2)]
    stacks = Stacks(caches, [10, 10], [(0, 1), (0,)])
    assert stacks.state(KEY, 0) is State.MISS and stacks.lacking(KEY, 0) == [0, 1]
    for slice_, expected in ((0, State.MISS), (1, State.PENDING)):
        stacks.by_slice[slice_][0].reserve(KEY, 10)
        assert stacks.state(KEY, 0) is expected
    stacks.by_slice[0][0].commit(KEY)
    assert stacks.state(KEY, 0) is State.PENDING and stacks.state(KEY, 1) is State.RESIDENT
    assert stacks.lacking(KEY, 0) == [1] and stacks.source(KEY, 1) is Tier.DISK
