"""What is looked up through later gates, and how often it is right; by hand."""

from __future__ import annotations

import pytest
from workload import event, make, said

from cache.errors import PolicyError
from cache.types import ExpertKey, Phase


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
    # Of all layers together (hits + 8 prior) / (observed + 8); layer 2 was wrong about positions 0 and 1 too.
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
