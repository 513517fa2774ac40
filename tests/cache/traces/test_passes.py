"""A trace's events are those of the runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import batched_trace, random_trace, with_everything

from cache.traces import passes
from cache.traces.passes import routing_events
from cache.traces.trace import PADDING, PREFILL, Trace
from cache.types import Phase, RoutingEvent


def events_one_by_one(trace: Trace, sequences: list[int]) -> list[RoutingEvent]:
    """What the runtime would have made of the trace, token after token."""
    rows = []
    for s in sequences:
        for token in range(trace.sequence_offsets[s], trace.sequence_offsets[s + 1]):
            own = (s, int(trace.step[token]))
            rows.append(((int(trace.forward[token]),) if trace.forward is not None else own, s, token))
    rows.sort(key=lambda row: row[0])  # stable
    result = []
    for key in dict.fromkeys(row[0] for row in rows):
        members = [(s, token) for k, s, token in rows if k == key]
        phases = {int(trace.phase[token]) for _, token in members} - {PADDING}
        for layer in range(trace.num_layers):
            totals: dict[int, list[float]] = {}
            for _, token in members:
                for expert, weight in zip(trace.experts[token, layer], trace.weights[token, layer], strict=True):
                    totals.setdefault(int(expert), []).append(float(weight))
            weights = {}
            for expert, values in totals.items():
                weights[expert] = 0.0
                for value in values:
                    weights[expert] += value
            order = sorted(totals, key=lambda e: (weights[e], e))
            result.append(
                RoutingEvent(
                    members[0][0],
                    int(trace.step[members[0][1]]),
                    layer,
                    Phase.PREFILL if PREFILL in phases else Phase.DECODE,
                    tuple(order),
                    tuple(weights[e] for e in order),
                    tuple(len(totals[e]) for e in order),
                )
            )
    return result


def test_a_pass_begins_with_what_it_reads() -> None:
    """All tokens of a batch's pass, padding included, and the mean of their embeddings; said with the first layer."""
    trace = with_everything()
    assert trace.ids is not None and trace.embeddings is not None and trace.forward is not None
    events = list(routing_events(trace))
    assert all((event.opening is not None) == (event.layer == 0) for event in events)
    openings = [event.opening for event in events if event.opening is not None]
    passes = np.unique(trace.forward)
    assert len(openings) == len(passes)
    for opening, number in zip(openings, passes, strict=True):
        tokens = trace.forward == number
        assert opening.ids == tuple(trace.ids[tokens].tolist())
        assert opening.embedding == pytest.approx(trace.embeddings[tokens].astype(np.float64).mean(axis=0), rel=1e-6)
    without = next(routing_events(replace(trace, embeddings=None)))
    assert without.opening is not None and without.opening.embedding is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batched=st.booleans(),
    uses=st.sampled_from([1, 20, 2**18]),
    cells=st.sampled_from([1, 50, 2**20]),
)
def test_events_are_those_of_the_runtime(seed: int, batched: bool, uses: int, cells: int) -> None:
    trace = batched_trace(seed) if batched else random_trace(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_BLOCK_USES", uses)
        patch.setattr(passes, "_BLOCK_CELLS", cells)
        assert list(routing_events(trace)) == events_one_by_one(trace, list(range(trace.num_sequences)))
        assert list(routing_events(trace, [2, 1])) == events_one_by_one(trace, [1, 2])


def test_steps_of_several_tokens_are_one_event() -> None:
    trace = Trace.from_arrays(
        [[[2, 0]], [[1, 2]], [[3, 0]]],
        [[[0.5, 0.25]], [[0.5, 0.25]], [[0.75, 0.25]]],
        [0, 3],
        num_experts=4,
        step=[0, 0, 1],
        phase=[0, 0, 1],
    )
    assert list(routing_events(trace)) == [
        RoutingEvent(0, 0, 0, Phase.PREFILL, (0, 1, 2), (0.25, 0.5, 0.75), (1, 1, 2)),
        RoutingEvent(0, 1, 0, Phase.DECODE, (0, 3), (0.25, 0.75), (1, 1)),
    ]


def test_weights_are_added_one_by_one_in_order() -> None:
    """2**53 + 1 + 1 + 1 is 2**53 only if added so: the ones together, or compensated for, would make a difference."""
    weights = np.array([2**53, 1, 1, 1], np.float32).reshape(4, 1, 1)
    trace = Trace.from_arrays(np.zeros((4, 1, 1)), weights, [0, 4], num_experts=2, step=[0, 0, 0, 0])
    assert [event.weights for event in routing_events(trace)] == [(float(2**53),)]


def test_interleaved_batches_come_in_running_order() -> None:
    """The second sequence runs inside of the first, the third before both."""
    trace = random_trace(lengths=(4, 2, 3))
    trace = replace(trace, forward=np.array([10, 11, 12, 13, 11, 12, 0, 1, 2]))
    trace.check()
    seen = [(event.sequence, event.step) for event in routing_events(trace) if event.layer == 0]
    assert seen == [(2, 0), (2, 1), (2, 2), (0, 0), (0, 1), (0, 2), (0, 3)]
    assert sum(sum(event.tokens) for event in routing_events(trace)) == 9 * 2 * 2
