"""The oracle knows a trace's future."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from workload import LAYERS, event, make, said, trace_of

from cache.traces.passes import batches, routing_events
from cache.types import ExpertKey, Phase


def test_the_oracle_knows_the_rest_of_this_pass_and_the_next_token() -> None:
    tokens = (((0, 1), (2, 3), (4, 5)), ((1, 0), (3, 6), (7, 4)), ((5, 1), (2, 0), (3, 6)), ((2, 1), (4, 3), (6, 5)))
    trace = trace_of(*tokens, offsets=(0, 2, 4))
    oracle = make("oracle", trace)
    for number, seen in enumerate(routing_events(trace)):
        oracle.observe(seen)
        token, layer = divmod(number, LAYERS)
        expected = [(1, layer + 1, token)] if layer + 1 < LAYERS else [(1, 0, token + 1)]
        expected += [(2, layer + 2, token)] if layer + 2 < LAYERS else [(2, layer + 2 - LAYERS, token + 1)]
        predictions = [(p.lead_layers, *p.key, p.probability) for p in oracle.predict(2)]
        assert predictions == [
            (lead, layer, expert, 1.0)
            for lead, layer, token in expected
            if token in ((0, 1) if number < 6 else (2, 3))
            for expert in sorted(tokens[token][layer])
        ]


def test_the_oracle_follows_a_prompt_read_in_another_way_than_recorded() -> None:
    tokens = [((0, 1), (2, 3), (4, 5)), ((1, 0), (3, 6), (7, 4)), ((5, 1), (2, 0), (3, 6)), ((2, 1), (4, 3), (6, 5))]
    oracle = make("oracle", trace_of(*tokens))
    prompt = event(0, (0, 1, 5), phase=Phase.PREFILL, tokens=(2, 3, 1))  # three tokens at once
    oracle.observe(prompt)
    assert set(said(oracle, 2)) == {ExpertKey(1, e) for e in (0, 2, 3, 6)} | {ExpertKey(2, e) for e in (3, 4, 5, 6, 7)}
    oracle.observe(prompt._replace(layer=2))
    assert set(said(oracle)) == {ExpertKey(0, 1), ExpertKey(0, 2)}
    oracle.observe(event(0, (1, 2), step=1))
    assert set(said(oracle)) == {ExpertKey(1, 3), ExpertKey(1, 4)}
    oracle.observe(event(0, (1, 2), step=2))  # the recording ended before
    assert oracle.predict(3) == []
    oracle.observe(event(0, (1, 2), step=0, sequence=9))
    assert oracle.predict(3) == []


def test_the_oracle_is_right_about_batches() -> None:
    trace = trace_of(*(((0, 1), (2, 3), (4, 5)), ((1, 6), (3, 6), (7, 4))) * 3, offsets=(0, 3, 6))
    trace = replace(trace, forward=np.array([0, 1, 2, 0, 1, 2]))
    assert [list(group) for group in batches(trace, np.arange(2))] == [[0, 1]]
    events = list(routing_events(trace))
    oracle = make("oracle", trace)
    for seen, following in itertools.pairwise(events):
        oracle.observe(seen)
        assert set(said(oracle)) == set(following.keys)
