"""What events say of single tokens: how much weight is before an expert, and what a rule dropped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from traces import batched_trace, random_trace

from cache.traces import passes
from cache.traces.by_token import ByToken, Mask, Routed, weight_before
from cache.traces.passes import routing_events
from cache.traces.trace import PADDING, PREFILL, Trace
from cache.types import Phase


def test_the_weight_before_an_expert_is_its_tokens_own() -> None:
    experts = np.array([[3, 1, 2], [0, 1, 2]])
    weights = np.array([[0.5, 1.0, 0.5], [1.0, 6.0, 3.0]], np.float32)
    # Of equal weights the higher id is the stronger.
    assert_allclose(weight_before(experts, weights), [[0.5, 0.0, 0.75], [0.9, 0.0, 0.6]])
    assert weight_before(experts, np.zeros((2, 3))).tolist() == [[0.0] * 3] * 2


def heavy(routed: Routed) -> Mask:
    """A rule that looks at all it is told: the heavier pairs, of prompts all but those of expert 0."""
    kept = routed.weights > np.median(routed.weights) if routed.continues else routed.experts != routed.layer
    return kept | (routed.weights == routed.weights.max())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batched=st.booleans(), drops=st.booleans(), uses=st.sampled_from([20, 2**18]))
def test_events_say_of_each_expert_what_its_tokens_say(seed: int, batched: bool, drops: bool, uses: int) -> None:
    """Against each token by itself."""
    trace = batched_trace(seed) if batched else random_trace(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_BLOCK_USES", uses)
        found = list(routing_events(trace, by_token=ByToken(heavy if drops else None, before=True)))
    plain = list(routing_events(trace))
    assert len(found) == len(plain)
    for event, whole in zip(found, plain, strict=True):
        rows = rows_of(trace, whole.sequence, whole.step)
        experts, weights = trace.experts[rows, whole.layer].astype(int), trace.weights[rows, whole.layer].astype(float)
        routed = Routed(whole.layer, experts, weights, whole.phase is Phase.DECODE)
        kept = heavy(routed) if drops else np.ones(experts.shape, bool)
        assert event.dropped == (~kept).sum()
        assert set(event.experts) == set(experts[kept].tolist())
        for expert, total, tokens in zip(event.experts, event.weights, event.tokens, strict=True):
            mine = kept & (experts == expert)
            assert tokens == mine.sum() and total == pytest.approx(weights[mine].sum())
        if len(rows) == 1:
            assert event.before == ()
            continue
        for expert, before in zip(event.experts, event.before, strict=True):
            shares = weight_before(experts, weights)
            assert before == shares[kept & (experts == expert)].min()


def rows_of(trace: Trace, sequence: int, step: int) -> list[int]:
    """The tokens of the pass that a sequence, of a batch the first, takes as its `step`-th."""
    start, end = trace.sequence_offsets[sequence : sequence + 2]
    if trace.forward is None:
        return [row for row in range(start, end) if trace.step[row] == step]
    group = next(group for group in passes.batches(trace, np.arange(trace.num_sequences)) if sequence == group[0])
    rows = [row for s in group for row in range(*trace.sequence_offsets[s : s + 2].tolist())]
    numbers = sorted({int(trace.forward[row]) for row in rows})
    return [row for row in rows if trace.forward[row] == numbers[step]]


def test_a_pass_continues_unless_a_token_of_it_reads_a_prompt() -> None:
    seen: list[tuple[int, bool]] = []

    def note(routed: Routed) -> None:
        seen.append((len(routed.experts), routed.continues))

    trace = Trace.from_arrays(
        np.zeros((5, 1, 1)),
        np.ones((5, 1, 1)),
        [0, 3, 5],
        num_experts=2,
        step=[0, 0, 1, 0, 1],
        phase=[PREFILL, PREFILL, 1, PADDING, 1],
        forward=np.array([0, 0, 1, 0, 1]),
    )
    events = list(routing_events(trace, by_token=ByToken(note)))
    assert seen == [(3, False), (2, True)]
    assert [event.dropped for event in events] == [0, 0]
