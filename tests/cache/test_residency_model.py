"""All transitions of an ExpertCache together, in any order, against a model of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_cache import EXPERTS, LAYERS, make_cache, use

from cache.types import ExpertKey


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
        used = sum(held.nbytes for held in self.held.values())
        assert sum(self.cache.used) == used <= self.cache.capacity_bytes
        assert self.cache.peak_bytes == self.peak


TestCacheAgainstModel = CacheAgainstModel.TestCase
TestCacheAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
