"""Patterns of routing: counted by hand in tiny traces, and by plain loops in random ones."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import batched_trace, random_trace

from cache.traces import patterns
from cache.traces.patterns import find_patterns
from cache.traces.trace import DECODE, PADDING, PREFILL, Trace


def trace_of(tokens: list[list[list[int]]], lengths: list[int], experts: int, phase: list[int] | None = None) -> Trace:
    """`tokens` [T, L, K] of sequences of these lengths, of equal weights."""
    ids = np.array(tokens)
    return Trace.from_arrays(ids, np.ones(ids.shape), np.cumsum([0, *lengths]), num_experts=experts, phase=phase)


# Two layers of five experts, one a token: 20 % are one expert. In the first sequence 0 is followed by 1, 1, 2, and 3 by
# 4; in the second 0 by 1, 2, 2, 2, and 3 by 4.
BY_HAND = trace_of(
    [[[0], [1]], [[0], [1]], [[0], [2]], [[3], [4]], [[0], [1]], [[0], [2]], [[0], [2]], [[0], [2]], [[3], [4]]],
    [4, 5],
    5,
)


def test_the_next_layer_by_hand() -> None:
    found = find_patterns(BY_HAND).next_layer
    assert found.candidates == 1
    # The first sequence names 1 for 0, and 4 for 3: of the five tokens of the second that is right for two.
    assert found.held_out.tolist() == found.together.tolist() == [2 / 5]
    # The most used there is 1.
    assert found.popular.tolist() == [1 / 5]
    # Of all nine tokens 0 goes to 2 four times and 1 three times, 3 to 4 twice.
    assert found.seen.tolist() == [6 / 9]


def test_the_next_token_by_hand() -> None:
    found = find_patterns(BY_HAND).next_token
    # Layer 0 of the first: 0 to 0 twice, 0 to 3 once. The second: 0 to 0 three times, 0 to 3 once.
    # Layer 1 of the first: 1 to 1, 1 to 2, 2 to 4, where 1's tie goes to the lower id. The second: 1 to 2, 2 to 2
    # twice, 2 to 4.
    assert found.held_out.tolist() == found.together.tolist() == [3 / 4, 1 / 4]
    assert found.popular.tolist() == [3 / 4, 0.0]


def test_skew_and_prompts_beside_replies_by_hand() -> None:
    phase = [PREFILL, PREFILL, PREFILL, DECODE, DECODE, DECODE, PADDING]
    tokens = [[[expert]] for expert in (0, 0, 1, 0, 1, 2, 2)]
    found = find_patterns(trace_of(tokens, [7], 4, phase))
    assert found.skew.tolist() == [3 / (6 / 4)]
    assert found.popularity is not None and found.popularity.overlap == {}
    # Uses of prompts 2, 1, 0, 0 have the ranks 3, 2, 0.5, 0.5; of replies 1, 1, 1, 0 the ranks 2, 2, 2, 0.
    assert found.popularity.spearman.tolist() == pytest.approx([np.corrcoef([3, 2, 0.5, 0.5], [2, 2, 2, 0])[0, 1]])


def test_the_most_used_of_prompts_and_replies_by_hand() -> None:
    """Prompts use 0 to 4, replies 2 to 6."""
    tokens = [[list(range(5))], [list(range(2, 7))]]
    found = find_patterns(trace_of(tokens, [2], 8, [PREFILL, DECODE])).popularity
    assert found is not None
    assert {top: shares.tolist() for top, shares in found.overlap.items()} == {5: [3 / 5]}


def test_what_runs_together_by_hand() -> None:
    """Ten pairs of five experts: a tenth is one pair. (0, 1) runs twice and (2, 3) once, then once and three times."""
    tokens = [[[0, 1]], [[1, 0]], [[2, 3]], [[0, 1]], [[2, 3]], [[2, 3]], [[3, 2]]]
    found = find_patterns(trace_of(tokens, [3, 4], 5)).together
    assert found is not None and found.pairs == 1
    assert (found.held_out.tolist(), found.seen.tolist()) == ([1 / 4], [4 / 7])


def test_what_a_trace_has_not() -> None:
    found = find_patterns(random_trace(lengths=(5,), layers=1, top_k=1))
    assert found.popularity is None and found.together is None
    assert found.next_layer.held_out.shape == found.next_layer.seen.shape == (0,)
    assert np.isnan(found.next_token.held_out).all() and np.isfinite(found.next_token.seen).all()


def by_loops(trace: Trace, sequences: range, token_ahead: bool) -> list[Counter[tuple[int, int]]]:
    """How often (present, next) comes, group by group."""
    groups = [Counter[tuple[int, int]]() for _ in range(trace.num_layers - (not token_ahead))]
    for sequence in sequences:
        start, end = trace.sequence_offsets[sequence : sequence + 2].tolist()
        tokens = [trace.experts[row].tolist() for row in range(start, end) if trace.phase[row] != PADDING]
        for group, counter in enumerate(groups):
            if token_ahead:
                both = [(here[group], after[group]) for here, after in itertools.pairwise(tokens)]
            else:
                both = [(token[group], token[group + 1]) for token in tokens]
            for present, following in both:
                counter.update(itertools.product(present, following))
    return groups


def likeliest(counter: Counter[tuple[int, int]], present: int, experts: int, many: int) -> set[int]:
    used: Counter[int] = Counter()
    for (_, following), count in counter.items():
        used[following] += count
    return set(sorted(range(experts), key=lambda e: (-counter[present, e], -used[e], e))[:many])


@settings(deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_tables_are_those_of_plain_loops(seed: int, batched: bool) -> None:
    trace = batched_trace(seed, experts=9) if batched else random_trace(seed, (6, 1, 4, 7), layers=3, experts=9)
    found = find_patterns(trace)
    middle = trace.num_sequences // 2
    for token_ahead, following in ((False, found.next_layer), (True, found.next_token)):
        first = by_loops(trace, range(middle), token_ahead)
        others = by_loops(trace, range(middle, trace.num_sequences), token_ahead)
        for group, (learned, measured) in enumerate(zip(first, others, strict=True)):
            named = {e: likeliest(learned, e, 9, following.candidates) for e in range(9)}
            right = sum(count for (one, other), count in measured.items() if other in named[one])
            assert following.held_out[group] == pytest.approx(right / measured.total())


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace(3, (40, 31, 25), layers=3, experts=12, top_k=3)
    whole = find_patterns(trace)
    monkeypatch.setattr(patterns, "_BLOCK_CELLS", 200)
    parts = find_patterns(trace)
    for one, other in ((whole.next_layer, parts.next_layer), (whole.next_token, parts.next_token)):
        for name in ("held_out", "together", "popular", "seen"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name))
    assert whole.together is not None and parts.together is not None
    np.testing.assert_allclose(whole.together.held_out, parts.together.held_out)


def test_together_adds_what_each_present_expert_says() -> None:
    """0 says 2 or 3 alike, 1 says 3: with both present 3 is the likeliest."""
    tokens = [[[0, 4], [2, 5]], [[0, 4], [3, 5]], [[1, 6], [3, 7]], [[0, 1], [3, 8]], [[0, 1], [3, 9]]]
    found = find_patterns(trace_of(tokens, [3, 2], 10)).next_layer
    assert found.candidates == 2
    assert found.together.tolist() == [1 / 2]


def test_together_weighs_present_experts_alike_however_often_they_came() -> None:
    """0 came six times, and says 2, 3 or 5 with a third each; 1 came once, and says 7 and 8 with a half each."""
    often = [[[0, 4], following] for following in ([2, 3], [3, 5], [5, 2])]
    found = find_patterns(trace_of([*often, *often, [[1, 6], [7, 8]], [[0, 1], [7, 8]]], [7, 1], 10)).next_layer
    assert found.together.tolist() == [1.0]
