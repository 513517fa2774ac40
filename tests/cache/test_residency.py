"""ExpertCache: what each transition does, and what misuse does."""

from __future__ import annotations

import numpy as np
import pytest
from small_cache import EXPERTS, LAYERS, SHARED, A, B, C, D, fill, make_cache, use

from cache.lanes import Ints, Lanes
from cache.policies.lru import LRU
from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Tier


def test_an_expert_goes_from_miss_to_pending_to_resident() -> None:
    cache = make_cache(100)
    assert cache.state(A) is State.MISS
    assert cache.reserve(A, 60) == []
    assert cache.state(A) is State.PENDING
    assert (sum(cache.used), cache.evictable_bytes()) == (60, 0)
    assert (cache.pending(), cache.resident()) == ([A], [])
    cache.commit(A)
    assert cache.state(A) is State.RESIDENT
    assert (sum(cache.used), cache.evictable_bytes()) == (60, 60)
    assert (cache.pending(), cache.resident()) == ([], [A])


def test_abort_gives_the_bytes_back() -> None:
    cache = make_cache(100)
    cache.reserve(A, 60)
    cache.abort(A)
    assert cache.state(A) is State.MISS
    assert sum(cache.used) == 0
    assert cache.reserve(B, 100) == []


def test_reserve_evicts_as_many_as_needed_and_no_more() -> None:
    cache = make_cache(40)
    fill(cache, A, B, C, D)
    assert cache.reserve(ExpertKey(1, 0), 15) == [A, B]
    assert cache.resident() == [C, D]
    assert sum(cache.used) == 35
    cache.check_integrity()


def test_reserve_that_cannot_succeed_changes_nothing() -> None:
    cache = make_cache(40)
    fill(cache, A, B, C, D)
    cache.pin(A)
    assert cache.evictable_bytes(protected=[B]) == 20
    assert cache.reserve(ExpertKey(1, 0), 21, protected=[B]) is None
    assert cache.resident() == [A, B, C, D]
    assert sum(cache.used) == 40
    assert cache.reserve(ExpertKey(1, 0), 20, protected=[B]) == [C, D]


def test_an_expert_larger_than_the_cache_is_never_reserved() -> None:
    cache = make_cache(40)
    fill(cache, A)
    assert cache.reserve(B, 41) is None
    assert cache.resident() == [A]
    assert make_cache(0).reserve(A, 1) is None


def test_pinned_pending_and_protected_experts_stay() -> None:
    cache = make_cache(40)
    fill(cache, A, B, C)
    cache.reserve(D, 10)
    cache.pin(A)
    assert cache.reserve(ExpertKey(1, 0), 10, protected=[B, B, ExpertKey(2, 3)]) == [C]
    assert cache.reserve(ExpertKey(1, 1), 10, protected=[B]) is None


def test_pins_are_counted() -> None:
    cache = make_cache(10)
    fill(cache, A)
    cache.pin(A)
    cache.pin(A)
    cache.unpin(A)
    assert cache.pinned() == [A]
    assert cache.reserve(B, 10) is None
    cache.unpin(A)
    assert cache.pinned() == []
    assert cache.reserve(B, 10) == [A]


def test_a_pin_taken_while_pending_holds_after_the_commit() -> None:
    cache = make_cache(10)
    cache.reserve(A, 10)
    cache.pin(A)
    cache.commit(A)
    assert cache.evictable_bytes() == 0
    cache.unpin(A)
    assert cache.evictable_bytes() == 10


def test_peak_is_the_most_that_was_used() -> None:
    cache = make_cache(50)
    fill(cache, A, B)
    cache.reserve(C, 10)
    cache.abort(C)
    assert (sum(cache.used), cache.peak_bytes) == (20, 30)
    cache.reset_peak()
    assert cache.peak_bytes == 20


def test_a_pool_for_each_layer_keeps_to_its_own() -> None:
    cache = make_cache(20, 20, 20)
    for layer in range(LAYERS):
        fill(cache, ExpertKey(layer, 0), ExpertKey(layer, 1))
    use(cache, ExpertKey(1, 0), step=1)
    assert cache.reserve(ExpertKey(1, 2), 10, protected=[ExpertKey(0, 1)]) == [ExpertKey(1, 1)]
    assert (cache.used, cache.capacity_bytes) == ([20, 20, 20], 60)
    cache.check_integrity()


def test_policies_hear_of_every_insertion_and_eviction() -> None:
    class Ledger(LRU):
        def reset(self) -> None:
            super().reset()
            self.log: list[tuple[str, int]] = []

        def on_insert(self, at: Ints) -> None:
            self.log += [("in", index) for index in at.tolist()]

        def on_evict(self, at: Ints) -> None:
            self.log += [("out", index) for index in at.tolist()]

    policy = Ledger(SHARED)
    cache = ExpertCache(Tier.CPU, [20], policy)
    fill(cache, A, B)
    cache.reserve(C, 10)
    cache.abort(C)
    assert policy.log == [("in", 0), ("in", 1), ("out", 0), ("in", 2), ("out", 2)]


@pytest.mark.parametrize("action", ["commit", "abort", "pin", "unpin"])
def test_acting_on_a_missing_expert_is_an_error(action: str) -> None:
    with pytest.raises(RuntimeError, match=f"{action} of .*miss"):
        getattr(make_cache(10), action)(A)


def test_misuse_is_an_error_and_changes_nothing() -> None:
    cache = make_cache(30)
    fill(cache, A)
    cache.reserve(B, 10)
    for misuse in (cache.commit, cache.abort, cache.unpin, lambda key: cache.reserve(key, 1)):
        with pytest.raises(RuntimeError):
            misuse(A)
    with pytest.raises(RuntimeError):
        cache.reserve(B, 1)
    cache.pin(B)
    with pytest.raises(RuntimeError, match="1 pins"):
        cache.abort(B)
    assert (cache.state(A), cache.state(B), sum(cache.used)) == (State.RESIDENT, State.PENDING, 20)
    cache.check_integrity()


@pytest.mark.parametrize("key", [(3, 0), (-1, 0), (0, 4), (0, -1)])
def test_experts_that_do_not_exist_are_an_error(key: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside"):
        make_cache(10).reserve(ExpertKey(*key), 1)


@pytest.mark.parametrize("nbytes", [0, -5])
def test_an_expert_has_bytes(nbytes: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        make_cache(10).reserve(A, nbytes)


@pytest.mark.parametrize("capacities", [(-1,), (9, 9, -1), (9, 9)])
def test_a_cache_that_cannot_be_is_an_error(capacities: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a cache"):
        make_cache(*capacities)


@pytest.mark.parametrize(("layers", "slots"), [(2, [1]), (1, [1, 1]), (0, [1, 1, 1])])
def test_lanes_cover_a_model(layers: int, slots: list[int]) -> None:
    with pytest.raises(ValueError, match="lanes"):
        Lanes(LAYERS, layers, EXPERTS, np.array(slots))


def test_idle_means_nothing_pending_and_nothing_pinned() -> None:
    cache = make_cache(20)
    fill(cache, A)
    cache.check_integrity(idle=True)
    cache.pin(A)
    cache.reserve(B, 10)
    cache.check_integrity()
    with pytest.raises(RuntimeError, match=r"not idle: pending .*expert=1.*pinned .*expert=0"):
        cache.check_integrity(idle=True)


@pytest.mark.parametrize(
    ("attribute", "value", "complaint"),
    [
        ("used", [11], "used_bytes is 11, its experts have 10"),
        ("_used_bytes", 11, "used_bytes is 11, its lanes have 10"),
        ("peak_bytes", 3, "peak_bytes is 3, 10 are used"),
        ("capacities", [9], "10 bytes are used of 9"),
    ],
)
def test_integrity_check_names_what_is_wrong(attribute: str, value: int, complaint: str) -> None:
    cache = make_cache(20)
    fill(cache, A)
    setattr(cache, attribute, value)
    with pytest.raises(RuntimeError, match=f"cpu cache: {complaint}"):
        cache.check_integrity()


def test_integrity_check_sees_a_wrong_mark() -> None:
    cache = make_cache(20)
    fill(cache, A)
    cache._candidates.mark(1 * EXPERTS + 2, 4, True)
    with pytest.raises(RuntimeError, match=r"wrongly marked .*layer=1, expert=2.*; 14 evictable bytes .* there are 10"):
        cache.check_integrity()
