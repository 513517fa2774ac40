"""The rules of our own: what they can see that others cannot, and how much of the gap they close on a real trace."""

from __future__ import annotations

import numpy as np
import pytest
from traces import SMALL, recorded

from cache.counting.counting import count
from cache.lanes import Lanes
from cache.policies.recall import History, RecallParams
from cache.policy import make_policy
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent


def cycle(seed: int, rounds: int, length: int = 12, layers: int = 2, experts: int = 16) -> Trace:
    """A phrase of `length` tokens said again and again, each token with two experts a layer of its own."""
    rng = np.random.default_rng(seed)
    phrase = np.argsort(rng.random((length, layers, experts)), axis=-1)[:, :, :2]
    tokens = np.tile(phrase, (rounds, 1, 1))
    weights = np.tile(np.array([0.6, 0.4], np.float32), (len(tokens), layers, 1))
    return Trace.from_arrays(tokens, weights, [0, len(tokens)], num_experts=experts)


def hit_rates(trace: Trace, slots: int, *policies: str, profile: Trace | None = None, cold: bool = True) -> list[float]:
    capacity = [[slots] * trace.num_layers]
    return [count(trace, name, capacity, cold=cold, profile=profile)[0].hit_rate for name in policies]


def gap_closed(trace: Trace, policy: str, slots: int, profile: Trace | None = None, cold: bool = True) -> float:
    lru, belady, ours = hit_rates(trace, slots, "lru", "belady", policy, profile=profile, cold=cold)
    return (ours - lru) / (belady - lru)


def test_recall_knows_a_phrase_that_it_has_heard() -> None:
    lru, lfu, recall, belady = hit_rates(cycle(1, 20), 6, "lru", "lfu", "recall", "belady")
    assert recall > 0.9 * belady
    assert recall > lru + 0.2 and recall > lfu + 0.1


def test_ridge_knows_what_its_profile_did() -> None:
    """The phrase is said once only, so nothing but the profile can tell."""
    again, heard = cycle(1, 2), cycle(1, 60)
    decay, ridge, belady = hit_rates(again, 6, "decay", "ridge(recall=0, penalty=1.0)", "belady", profile=heard)
    assert ridge > decay + 0.1
    assert ridge > 0.85 * belady


def test_decay_by_hand() -> None:
    policy = make_policy("decay(rates=(0.5, 0.25))", Lanes.shared(1, 4))
    for step, experts in enumerate([(0, 1), (1,), (2,)]):
        ones = (1,) * len(experts)
        policy.on_event(RoutingEvent(0, step, 0, Phase.DECODE, experts, tuple(map(float, ones)), ones))
    expected = [0.25 + 0.5625, 0.25 + 0.5 + 0.5625 + 0.75, 2.0, 0.0]
    assert policy.priorities(slice(None))[0].tolist() == pytest.approx(expected)


def test_recall_by_hand() -> None:
    """One layer: after {0, 1} came {2}; now {0} is used, which resembles the first pass alone."""
    params = RecallParams(focus=1.0, own=1.0, fade=0.5, discount=0.5, prior=0.0)
    history = History(1, 4, params)
    for members in ([0, 1], [2]):
        history.begin_pass()
        history.use(0, np.array(members))
    history.begin_pass()
    value = history.use(0, np.array([0]))
    # Shared with pass 0: one expert, and as much again by `own`; with pass 1: none. What was shared before fades, and
    # was nothing here. After pass 0, expert 2 came at once and 0 a pass later; after pass 1, 0 came at once.
    attention = np.exp([2.0, 0.0])
    attention /= attention.sum()
    assert value.tolist() == pytest.approx([0.5 * attention[0] + attention[1], 0, attention[0], 0], abs=1e-6)


def test_what_is_kept_out_of_the_window_is_forgotten() -> None:
    history = History(1, 4, RecallParams(window=3, prior=0.0))
    for members in ([0], [1], [2], [2], [3]):
        history.begin_pass()
        value = history.use(0, np.array(members))
    assert value[0] == value[1] == 0  # the pass that 1 followed has left the ring
    assert value[3] > 0


def test_recall_closes_half_of_the_gap_on_a_real_trace() -> None:
    trace = recorded(SMALL)
    assert gap_closed(trace, "recall", 8) == pytest.approx(0.538, abs=0.005)
    assert gap_closed(trace, "recall", 8, cold=False) == pytest.approx(0.552, abs=0.005)
    assert gap_closed(trace, "decay", 8) == pytest.approx(0.311, abs=0.005)


def test_ridge_closes_half_of_the_gap_on_sequences_it_has_not_seen() -> None:
    trace = recorded(SMALL)
    seen, unseen = trace.select(range(0, 20, 2)), trace.select(range(1, 20, 2))
    assert gap_closed(unseen, "ridge", 8, profile=seen) > 0.5
