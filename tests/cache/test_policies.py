"""Every eviction policy: the contract all of them keep, worked examples, and golden counts on a trace."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.policy import EvictionPolicy, make_policy, names
from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Phase, RoutingEvent, Tier

POLICIES = names()


def event(layer: int, *experts: int, step: int, sequence: int = 0) -> RoutingEvent:
    n = len(experts)
    return RoutingEvent(sequence, step, layer, Phase.DECODE, experts, (1 / max(n, 1),) * n, (1,) * n)


def order(policy: EvictionPolicy) -> list[tuple[int, int]]:
    """Every expert, first to evict first, as (layer, expert)."""
    return [tuple(key) for key in policy.eviction_order(np.ones(policy.shape, np.bool_), slice(None))]


def random_events(count: int, layers: int, experts: int, seed: int) -> Iterator[RoutingEvent]:
    rng = random.Random(seed)
    for i in range(count):
        step, layer = divmod(i, layers)
        chosen = rng.sample(range(experts), rng.randint(1, 4))
        yield event(layer, *chosen, step=step % 50, sequence=step // 50)


# The contract


@pytest.mark.parametrize("name", POLICIES)
def test_ten_thousand_random_events(name: str) -> None:
    """Sizes, pins, pending and protected experts mixed; each reservation is checked against a full sort."""
    layers, experts = 3, 16
    policy = make_policy(name, layers, experts)
    cache = ExpertCache(Tier.CPU, 100, policy)
    rng = random.Random(1)
    sizes: dict[ExpertKey, int] = {}
    evicted = refused = 0
    for i, ev in enumerate(random_events(10_000, layers, experts, seed=2)):
        policy.on_event(ev)
        protected = set(ev.keys)
        for key in ev.keys:
            if cache.state(key) is not State.MISS:
                continue
            nbytes = rng.randint(1, 30)
            keep = protected | set(cache.pinned())
            values = policy.priorities(slice(None))
            free = cache.capacity_bytes - cache.used_bytes
            expected = []
            for candidate in sorted(cache.resident(), key=lambda key: (values[key], policy.recency[key], key)):
                if free < nbytes and candidate not in keep:
                    expected.append(candidate)
                    free += sizes[candidate]
            before = cache.resident(), cache.pending(), cache.used_bytes
            victims = cache.reserve(key, nbytes, protected)
            if victims is None:
                refused += 1
                assert free < nbytes
                assert (cache.resident(), cache.pending(), cache.used_bytes) == before
                continue
            assert victims == expected
            evicted += len(victims)
            sizes[key] = nbytes
            assert cache.used_bytes <= cache.capacity_bytes
        for key in cache.pending():
            if rng.random() < 0.6:
                (cache.commit if rng.random() < 0.9 else cache.abort)(key)
        for key in cache.pinned():
            cache.unpin(key)
        for key in rng.sample(cache.resident(), min(2, len(cache.resident()))):
            cache.pin(key)
        if i % 500 == 0:
            cache.check_integrity()
    cache.check_integrity()
    assert evicted > 5000
    assert refused > 100


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_events_give_the_same_order(name: str) -> None:
    policies = [make_policy(name, 2, 8) for _ in range(2)]
    for ev in random_events(300, 2, 8, seed=3):
        for policy in policies:
            policy.on_event(ev)
        assert order(policies[0]) == order(policies[1])


@pytest.mark.parametrize("name", POLICIES)
def test_asking_for_priorities_changes_nothing(name: str) -> None:
    asked, quiet = make_policy(name, 2, 8), make_policy(name, 2, 8)
    for ev in random_events(100, 2, 8, seed=4):
        asked.on_event(ev)
        quiet.on_event(ev)
        asked.priorities(slice(0, 1))
        order(asked)
    assert order(asked) == order(quiet)


@pytest.mark.parametrize("name", POLICIES)
def test_reset_forgets_everything(name: str) -> None:
    used, fresh = make_policy(name, 2, 8), make_policy(name, 2, 8)
    events = list(random_events(100, 2, 8, seed=5))
    for ev in events:
        used.on_event(ev)
    used.on_insert(ExpertKey(0, 0))
    used.on_evict(ExpertKey(0, 1))
    assert order(used) != order(fresh)
    used.reset()
    assert order(used) == order(fresh)
    for ev in [events[-1], *random_events(100, 2, 8, seed=6)]:
        used.on_event(ev)
        fresh.on_event(ev)
        assert used.step == fresh.step
    assert order(used) == order(fresh)
    assert np.array_equal(used.priorities(slice(None)), fresh.priorities(slice(None)))


@pytest.mark.parametrize("name", POLICIES)
def test_a_slice_of_layers_ranks_as_the_whole_does(name: str) -> None:
    policy = make_policy(name, 4, 8)
    for ev in random_events(200, 4, 8, seed=7):
        policy.on_event(ev)
    part = policy.eviction_order(np.ones((2, 8), np.bool_), slice(1, 3))
    assert [tuple(key) for key in part] == [key for key in order(policy) if key[0] in (1, 2)]


@pytest.mark.parametrize("name", POLICIES)
def test_an_event_may_need_no_expert(name: str) -> None:
    policy = make_policy(name, 1, 4)
    policy.on_event(event(0, 2, step=0))
    before = order(policy)
    policy.on_event(event(0, step=0))
    assert order(policy) == before


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_prints_its_name_and_parameters(name: str) -> None:
    policy = make_policy(name, 2, 8)
    assert policy.name == name
    assert repr(policy.params) in repr(policy)


# Worked examples


def test_lru_by_hand() -> None:
    policy = make_policy("lru", 2, 4)
    assert order(policy)[:3] == [(0, 0), (0, 1), (0, 2)]
    policy.on_event(event(0, 2, 0, step=0))
    policy.on_event(event(1, 3, step=0))
    policy.on_event(event(0, 1, 2, step=1))
    never_used = [(0, 3), (1, 0), (1, 1), (1, 2)]
    assert order(policy) == [*never_used, (0, 0), (1, 3), (0, 1), (0, 2)]


def test_lfu_by_hand() -> None:
    policy = make_policy("lfu", 1, 5)
    policy.on_event(event(0, 3, 1, step=0))
    policy.on_event(event(0, 1, 0, step=1))
    policy.on_event(event(0, 2, 1, step=2))
    policy.on_event(event(0, 3, step=3))
    # Uses 1, 3, 1, 2, 0. Experts 0 and 2 tie and 0 was used earlier.
    assert order(policy) == [(0, 4), (0, 0), (0, 2), (0, 3), (0, 1)]


def test_lfru_by_hand() -> None:
    policy = make_policy("lfru", 1, 5)
    for step, experts in enumerate([(0, 1), (0, 2), (0,), (3,)]):
        policy.on_event(event(0, *experts, step=step))
    assert policy.priorities(slice(None)).tolist() == [[3 / 2, 1 / 4, 1 / 3, 1 / 1, 0]]
    assert order(policy) == [(0, 4), (0, 1), (0, 2), (0, 3), (0, 0)]


def test_lfru_ties_are_broken_by_lru() -> None:
    policy = make_policy("lfru", 1, 4)
    for step, experts in enumerate([(3, 1), (3,), (0, 2)]):
        policy.on_event(event(0, *experts, step=step))
    # 3: two uses, one pass ago; 0 and 2: one use, now; all of priority 1. Expert 1: one use, two passes ago.
    assert order(policy) == [(0, 1), (0, 3), (0, 0), (0, 2)]


def test_lfru_counts_passes_on_when_steps_begin_anew() -> None:
    policy = make_policy("lfru", 2, 2)
    policy.on_event(event(0, 0, step=7))
    policy.on_event(event(1, 1, step=7))
    policy.on_event(event(0, 1, step=0, sequence=1))
    assert policy.priorities(slice(None)).tolist() == [[1 / 2, 1 / 1], [0, 1 / 2]]
    assert order(policy) == [(1, 0), (0, 0), (1, 1), (0, 1)]


@settings(deadline=None, derandomize=True)
@example([(2**26 - 2, 2**26 - 2), (2**26 - 3, 2**26 - 3), (1, 2), (2, 5), (2**25, 2**26 - 1)])
@given(st.lists(st.tuples(st.integers(0, 2**26 - 1), st.integers(1, 2**26 - 1)), min_size=2, max_size=12))
def test_lfru_ranks_as_exact_fractions_do(experts: list[tuple[int, int]]) -> None:
    policy = make_policy("lfru", 1, len(experts))
    policy.step = 2**26
    policy.uses[0] = [uses for uses, _ in experts]
    policy.last_step[0] = [2**26 - age for _, age in experts]
    policy.recency[0] = np.arange(len(experts))[::-1]
    exact = sorted(range(len(experts)), key=lambda e: (Fraction(experts[e][0], experts[e][1] + 1), -e))
    assert order(policy) == [(0, e) for e in exact]


# A policy that misbehaves is named


class Wrong(EvictionPolicy):
    answer: NDArray[Any]

    def priorities(self, layers: slice) -> NDArray[Any]:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (np.zeros((1, 3)), r'"Wrong" gave priorities of shape \(1, 3\), not \(2, 3\)'),
        (np.full((2, 3), np.nan), '"Wrong" gave a priority that is not a number'),
    ],
)
def test_nonsense_priorities_are_refused_and_change_nothing(answer: NDArray[Any], complaint: str) -> None:
    policy = Wrong(2, 3)
    policy.answer = answer
    cache = ExpertCache(Tier.CPU, 2, policy)
    for expert in range(2):
        cache.reserve(ExpertKey(0, expert), 1)
        cache.commit(ExpertKey(0, expert))
    with pytest.raises(PolicyError, match=complaint):
        cache.reserve(ExpertKey(1, 0), 1)
    cache.check_integrity(idle=True)
    assert len(cache.resident()) == 2


@pytest.mark.parametrize(("layers", "experts"), [(0, 4), (4, 0), (-1, 4)])
def test_a_model_without_experts_has_no_policy(layers: int, experts: int) -> None:
    with pytest.raises(ValueError, match="layers"):
        make_policy("lru", layers, experts)


# Golden counts

LAYERS, EXPERTS, TOP_K, TOKENS = 4, 32, 4, 400


def zipf_markov_trace() -> list[RoutingEvent]:
    """Skewed, sticky routing: each of a token's experts is kept for the next one with probability .45."""
    rng = random.Random(20)
    cumulative = list(itertools.accumulate(1 / (rank + 1) ** 0.9 for rank in range(EXPERTS)))
    ranking = [[(7 * e + 5 * layer) % EXPERTS for e in range(EXPERTS)] for layer in range(LAYERS)]
    last: list[list[int]] = [[] for _ in range(LAYERS)]
    events = []
    for token in range(TOKENS):
        for layer in range(LAYERS):
            chosen = [expert for expert in last[layer] if rng.random() < 0.45]
            while len(chosen) < TOP_K:
                # The popular experts drift, so that frequency and recency disagree.
                rank = bisect.bisect(cumulative, rng.random() * cumulative[-1])
                expert = ranking[layer][(rank + 3 * (token // 100)) % EXPERTS]
                if expert not in chosen:
                    chosen.append(expert)
            last[layer] = chosen
            events.append(event(layer, *chosen, step=token))
    return events


def count_hits(name: str, slots: int, per_layer: bool) -> int:
    """Hits on the trace, fetching on demand, with `slots` experts a layer: in a pool each or all in one."""
    policy = make_policy(name, LAYERS, EXPERTS)
    if per_layer:
        pools = [ExpertCache(Tier.GPU, slots, policy, range(layer, layer + 1)) for layer in range(LAYERS)]
    else:
        pools = [ExpertCache(Tier.GPU, slots * LAYERS, policy)] * LAYERS
    hits = 0
    for ev in zipf_markov_trace():
        pool = pools[ev.layer]
        missing = [key for key in ev.keys if pool.state(key) is State.MISS]
        hits += TOP_K - len(missing)
        policy.on_event(ev)
        for key in missing:
            assert pool.reserve(key, 1, ev.keys) is not None
            pool.commit(key)
    for pool in pools:
        pool.check_integrity(idle=True)
    return hits


GOLDEN = {
    ("lfru", 6, True): 4043,
    ("lfru", 6, False): 3541,
    ("lfru", 12, True): 4883,
    ("lfru", 12, False): 4823,
    ("lfu", 6, True): 3866,
    ("lfu", 6, False): 2014,
    ("lfu", 12, True): 4750,
    ("lfu", 12, False): 3704,
    ("lru", 6, True): 3880,
    ("lru", 6, False): 3795,
    ("lru", 12, True): 4799,
    ("lru", 12, False): 4739,
}


@pytest.mark.parametrize(("name", "slots", "per_layer"), GOLDEN)
def test_golden_hits(name: str, slots: int, per_layer: bool) -> None:
    assert count_hits(name, slots, per_layer) == GOLDEN[name, slots, per_layer]


def test_every_policy_has_golden_hits_and_no_two_have_the_same() -> None:
    by_policy = {
        name: tuple(GOLDEN[name, slots, pool] for slots in (6, 12) for pool in (True, False)) for name in POLICIES
    }
    assert len(set(by_policy.values())) == len(POLICIES)
    assert all(0 < hits < LAYERS * TOP_K * TOKENS for counts in by_policy.values() for hits in counts)
