"""ExpertCache: what each transition does, what misuse does, and all of them together against a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.lanes import Ints, Lanes
from cache.policies.lru import LRU
from cache.policy import make_policy
from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Phase, RoutingEvent, Tier

LAYERS, EXPERTS = 3, 4
A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


SHARED = Lanes.shared(LAYERS, EXPERTS)


def make_cache(*capacities: int, policy: str = "lru") -> ExpertCache:
    """One pool of so many bytes, or one for each layer."""
    lanes = SHARED if len(capacities) == 1 else Lanes.per_layer(LAYERS, EXPERTS)
    return ExpertCache(Tier.CPU, capacities, make_policy(policy, lanes))


def use(cache: ExpertCache, *keys: ExpertKey, step: int = 0) -> None:
    """Tell the policy that `keys`, all of one layer, were used, the last one most recently."""
    n = len(keys)
    experts = tuple(key.expert for key in keys)
    cache.policy.on_event(RoutingEvent(0, step, keys[0].layer, Phase.DECODE, experts, (0.5,) * n, (1,) * n))


def fill(cache: ExpertCache, *keys: ExpertKey, nbytes: int = 10) -> None:
    """Make `keys` resident and used, in order."""
    for key in keys:
        assert cache.reserve(key, nbytes) == []
        cache.commit(key)
    use(cache, *keys)


def test_an_expert_goes_from_miss_to_pending_to_resident() -> None:
    cache = make_cache(100)
    assert cache.state(A) is State.MISS
    assert cache.reserve(A, 60) == []
    assert cache.state(A) is State.PENDING
    assert (cache.used_bytes, cache.evictable_bytes()) == (60, 0)
    assert (cache.pending(), cache.resident()) == ([A], [])
    cache.commit(A)
    assert cache.state(A) is State.RESIDENT
    assert (cache.used_bytes, cache.evictable_bytes()) == (60, 60)
    assert (cache.pending(), cache.resident()) == ([], [A])


def test_abort_gives_the_bytes_back() -> None:
    cache = make_cache(100)
    cache.reserve(A, 60)
    cache.abort(A)
    assert cache.state(A) is State.MISS
    assert cache.used_bytes == 0
    assert cache.reserve(B, 100) == []


def test_reserve_evicts_as_many_as_needed_and_no_more() -> None:
    cache = make_cache(40)
    fill(cache, A, B, C, D)
    assert cache.reserve(ExpertKey(1, 0), 15) == [A, B]
    assert cache.resident() == [C, D]
    assert cache.used_bytes == 35
    cache.check_integrity()


def test_reserve_that_cannot_succeed_changes_nothing() -> None:
    cache = make_cache(40)
    fill(cache, A, B, C, D)
    cache.pin(A)
    assert cache.evictable_bytes(protected=[B]) == 20
    assert cache.reserve(ExpertKey(1, 0), 21, protected=[B]) is None
    assert cache.resident() == [A, B, C, D]
    assert cache.used_bytes == 40
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
    fill(cache, A, B, C)
    cache.evict(A)
    assert (cache.used_bytes, cache.peak_bytes) == (20, 30)
    cache.reset_peak()
    assert cache.peak_bytes == 20


def test_a_pool_for_each_layer_keeps_to_its_own() -> None:
    cache = make_cache(20, 20, 20)
    for layer in range(LAYERS):
        fill(cache, ExpertKey(layer, 0), ExpertKey(layer, 1))
    use(cache, ExpertKey(1, 0), step=1)
    assert cache.reserve(ExpertKey(1, 2), 10, protected=[ExpertKey(0, 1)]) == [ExpertKey(1, 1)]
    assert (cache.used, cache.used_bytes, cache.capacity_bytes) == ([20, 20, 20], 60, 60)
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
    cache.evict(B)
    assert policy.log == [("in", 0), ("in", 1), ("out", 0), ("in", 2), ("out", 2), ("out", 1)]


@pytest.mark.parametrize("action", ["commit", "abort", "evict", "pin", "unpin"])
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
    for misuse in (cache.evict, lambda key: cache.reserve(key, 1)):
        with pytest.raises(RuntimeError):
            misuse(B)
    cache.pin(A)
    cache.pin(B)
    for misuse, key in ((cache.evict, A), (cache.abort, B)):
        with pytest.raises(RuntimeError, match="1 pins"):
            misuse(key)
    assert (cache.state(A), cache.state(B), cache.used_bytes) == (State.RESIDENT, State.PENDING, 20)
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
        ("_evictable_bytes", [4], "4 evictable bytes are counted, there are 10"),
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
    cache._evictable[1 * EXPERTS + 2] = True
    with pytest.raises(RuntimeError, match=r"wrongly marked .*layer=1, expert=2"):
        cache.check_integrity()


@dataclass
class Held:
    nbytes: int
    resident: bool = False
    pins: int = 0


keys = st.builds(ExpertKey, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


class CacheAgainstModel(RuleBasedStateMachine):
    """Every rule may be called for any key: the model says whether it must succeed, and with what result."""

    @initialize(capacity=st.integers(0, 25))
    def start(self, capacity: int) -> None:
        self.cache = make_cache(capacity)
        self.held: dict[ExpertKey, Held] = {}
        self.used_last: list[ExpertKey] = []
        self.peak = 0
        self.step = 0

    def act(self, action: str, key: ExpertKey, allowed: bool) -> bool:
        if not allowed:
            with pytest.raises(RuntimeError):
                getattr(self.cache, action)(key)
            return False
        getattr(self.cache, action)(key)
        return True

    def recency(self, key: ExpertKey) -> tuple[int, ExpertKey]:
        return (self.used_last.index(key) if key in self.used_last else -1), key

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.permutations(range(EXPERTS)), k=st.integers(1, EXPERTS))
    def event(self, layer: int, experts: list[int], k: int) -> None:
        needed = [ExpertKey(layer, expert) for expert in experts[:k]]
        use(self.cache, *needed, step=self.step)
        self.step += 1
        self.used_last = [key for key in self.used_last if key not in needed] + needed

    @rule(key=keys, nbytes=st.integers(1, 9), protected=st.lists(keys, max_size=6))
    def reserve(self, key: ExpertKey, nbytes: int, protected: list[ExpertKey]) -> None:
        if key in self.held:
            with pytest.raises(RuntimeError):
                self.cache.reserve(key, nbytes, protected)
            return
        free = self.cache.capacity_bytes - sum(held.nbytes for held in self.held.values())
        victims = []
        for candidate in sorted(self.held, key=self.recency):
            held = self.held[candidate]
            if free < nbytes and held.resident and not held.pins and candidate not in protected:
                victims.append(candidate)
                free += held.nbytes
        result = self.cache.reserve(key, nbytes, protected)
        if free < nbytes:
            assert result is None
            return
        assert result == victims
        for victim in victims:
            del self.held[victim]
        self.held[key] = Held(nbytes)
        self.peak = max(self.peak, sum(held.nbytes for held in self.held.values()))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def commit_one(self, data: st.DataObject) -> None:
        self.commit(data.draw(st.sampled_from(sorted(self.held))))

    @rule(key=keys)
    def commit(self, key: ExpertKey) -> None:
        held = self.held.get(key)
        if self.act("commit", key, held is not None and not held.resident):
            self.held[key].resident = True

    @rule(key=keys)
    def abort(self, key: ExpertKey) -> None:
        held = self.held.get(key)
        if self.act("abort", key, held is not None and not held.resident and not held.pins):
            del self.held[key]

    @rule(key=keys)
    def evict(self, key: ExpertKey) -> None:
        held = self.held.get(key)
        if self.act("evict", key, held is not None and held.resident and not held.pins):
            del self.held[key]

    @rule(key=keys)
    def pin(self, key: ExpertKey) -> None:
        if self.act("pin", key, key in self.held):
            self.held[key].pins += 1

    @rule(key=keys)
    def unpin(self, key: ExpertKey) -> None:
        held = self.held.get(key)
        if self.act("unpin", key, held is not None and held.pins > 0):
            self.held[key].pins -= 1

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        assert self.cache.resident() == [key for key, held in self.held.items() if held.resident]
        assert self.cache.pending() == [key for key, held in self.held.items() if not held.resident]
        assert self.cache.pinned() == [key for key, held in self.held.items() if held.pins]
        assert self.cache.used_bytes == sum(held.nbytes for held in self.held.values())
        assert self.cache.used_bytes <= self.cache.capacity_bytes
        assert self.cache.peak_bytes == self.peak


TestCacheAgainstModel = CacheAgainstModel.TestCase
TestCacheAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
