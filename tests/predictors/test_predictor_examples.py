"""Each predictor against figures worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from workload import EXPERTS, LAYERS, event, passes, trace_of

from cache.errors import PolicyError
from cache.passes import batches
from cache.trace import Trace
from cache.types import ExpertKey, Phase
from predictors.base import Predictor, make_predictor


def make(spec: str, profile: Trace | None = None) -> Predictor:
    return make_predictor(spec, LAYERS, EXPERTS, profile)


def said(predictor: Predictor, depth: int = 1) -> dict[ExpertKey, float]:
    return {p.key: pytest.approx(p.probability) for p in predictor.predict(depth)}


# The gates of later layers


def test_the_gate_starts_from_its_priors_and_learns_how_often_each_position_is_right() -> None:
    gate = make("cross-layer-gate")
    assert gate.looks_ahead
    ahead = ((4, 5, 6, 7), (0, 1, 2, 3))
    gate.observe(event(0, (0, 1), ahead=ahead))
    first = gate.predict(2)
    assert [(p.key.layer, p.key.expert, p.probability, p.lead_layers) for p in first] == [
        *((1, 4, 0.8, 1), (1, 5, 0.8, 1), (1, 6, 0.2, 1), (1, 7, 0.2, 1)),
        *((2, 0, 0.8, 2), (2, 1, 0.8, 2), (2, 2, 0.2, 2), (2, 3, 0.2, 2)),
    ]
    gate.observe(event(1, (5, 6), ahead=((7, 6),)))  # the first position was wrong, the second and third right
    gate.observe(event(2, (0, 1)))
    assert gate.predict(3) == []  # of the next token nothing is known
    gate.observe(event(0, (0, 1), step=1, ahead=((4, 5, 6, 7),)))
    # Of all layers together (hits + 8 prior) / (observed + 8); at positions 0 and 1 layer 2 was wrong about 7 and 6 too.
    overall = [8 * 0.8 / 10, (1 + 8 * 0.8) / 10, (1 + 8 * 0.2) / 9, 8 * 0.2 / 9]
    # And of layer 1 the same, with that as its prior.
    rates = [(hit + 8 * prior) / 9 for hit, prior in zip((0, 1, 1, 0), overall, strict=True)]
    assert said(gate) == {ExpertKey(1, 4 + position): rate for position, rate in enumerate(rates)}
    assert [p.key.expert for p in gate.predict(1)] == [5, 4, 6, 7]


def test_the_gate_takes_as_many_more_as_it_is_told_to() -> None:
    for spec, count in (("cross-layer-gate", 4), ("cross-layer-gate(extra=0)", 2), ("cross-layer-gate(extra=3)", 5)):
        gate = make(spec)
        gate.observe(event(0, (0, 1), ahead=((7, 6, 5, 4, 3, 2),)))
        assert [p.key.expert for p in gate.predict(1)] == [7, 6, 5, 4, 3, 2][:count]
    with pytest.raises(PolicyError, match="extra is -1, negative"):
        make("cross-layer-gate(extra=-1)")


def test_what_was_said_of_another_pass_teaches_nothing() -> None:
    gate = make("cross-layer-gate")
    gate.observe(event(0, (0, 1), ahead=((4, 5),)))
    gate.observe(event(0, (0, 1), step=1, ahead=((4, 5),)))  # the pass before was given up
    gate.observe(event(1, (4, 5), sequence=3, step=1, ahead=((4, 5),)))
    assert [p.probability for p in gate.predict(1)] == [0.8, 0.8]


def test_prefill_and_decoding_are_told_apart() -> None:
    gate = make("cross-layer-gate")
    for step in range(50):
        gate.observe(event(0, (0, 1), step=step, phase=Phase.PREFILL, ahead=((4, 5),)))
        gate.observe(event(1, (4, 5), step=step, phase=Phase.PREFILL))
    gate.observe(event(0, (0, 1), step=50, ahead=((4, 5),)))
    assert [p.probability for p in gate.predict(1)] == [0.8, 0.8]
    gate.observe(event(0, (0, 1), step=51, phase=Phase.PREFILL, ahead=((4, 5),)))
    assert all(p.probability > 0.95 for p in gate.predict(1))


# Frequency


def test_frequency_is_the_faded_share_of_a_layers_tokens() -> None:
    frequency = make("frequency(rate=0.5)")
    for seen in passes(((0, 1), (4, 5), (6, 7)), ((0, 2), (4, 5), (6, 7)), ((0, 1), (4, 5), (6, 7))):
        frequency.observe(seen)
    # Of layer 0, three tokens: worth 1/4 + 1/2 + 1, and one that went nowhere.
    assert said(frequency) == {
        ExpertKey(0, 0): 1.75 / 2.75,
        ExpertKey(0, 1): 1.25 / 2.75,
        ExpertKey(0, 2): 0.5 / 2.75,
    }
    assert [(p.key, p.lead_layers) for p in frequency.predict(2)][3:] == [(ExpertKey(1, 4), 2), (ExpertKey(1, 5), 2)]


def test_a_pass_of_many_tokens_needs_an_expert_unless_none_of_them_does() -> None:
    frequency = make("frequency(rate=0.5)")
    for seen in passes(((0, 1), (4, 5), (6, 7))):
        frequency.observe(seen)
    prompt = event(0, (0, 1, 2), step=1, phase=Phase.PREFILL, tokens=(2, 1, 1))  # two tokens of two experts each
    frequency.observe(prompt)
    assert said(frequency) == {ExpertKey(1, 4): 0.75, ExpertKey(1, 5): 0.75}  # 1 - (1 - 1/2)^2
    frequency.observe(prompt._replace(layer=1, experts=(4, 5), tokens=(2, 2)))
    frequency.observe(prompt._replace(layer=2, experts=(6, 7), tokens=(2, 2)))
    # The next pass decodes. Layer 0 saw one token, worth 1/4 now, and two worth (1 + 1/2) / 2 each.
    assert said(frequency)[ExpertKey(0, 0)] == (0.25 + 1.5) / (0.25 + 1.5 + 1)


# The oracle


def test_the_oracle_knows_the_rest_of_this_pass_and_the_next_token() -> None:
    tokens = (((0, 1), (2, 3), (4, 5)), ((1, 0), (3, 6), (7, 4)), ((5, 1), (2, 0), (3, 6)), ((2, 1), (4, 3), (6, 5)))
    trace = trace_of(*tokens, offsets=(0, 2, 4))
    oracle = make("oracle", trace)
    for number, seen in enumerate(trace.events()):
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
    events = list(trace.events())
    oracle = make("oracle", trace)
    for seen, following in itertools.pairwise(events):
        oracle.observe(seen)
        assert set(said(oracle)) == set(following.keys)
