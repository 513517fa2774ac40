"""Regressions on the routing so far, by hand."""

from __future__ import annotations

import pytest
from workload import LAYERS, event, log_odds, make, passes, random_events, said, sigmoid

from cache.types import ExpertKey, Phase


def test_a_regression_takes_one_step_at_every_event() -> None:
    logistic = make("logistic(context=1, reach=1, rate=1.5)")
    for seen in passes(((0, 1), (4, 5), (6, 7)), ((0, 1), (4, 5), (6, 7)))[:4]:
        logistic.observe(seen)
    # Knowing nothing, every expert is needed with a probability of 2 / 8. Layer 1 came once: its weights of 0, 1 and
    # the constant moved by 1.5 / 3 of the error each, so that together they move the odds by 1.5 times that.
    expected = sigmoid(log_odds(0.25) + 1.5 * 0.75)
    # Of the second pass there is one input more, layer 1's experts a pass before, with no weight yet.
    others = sigmoid(log_odds(0.25) - 1.5 * 0.25)
    assert said(logistic) == {ExpertKey(1, 4): expected, ExpertKey(1, 5): expected} | {
        ExpertKey(1, expert): others for expert in (0, 1)
    }


def test_a_regression_is_near_certain_of_what_always_follows() -> None:
    logistic = make("logistic")
    for step in range(100):
        for seen in passes(((step % 2, 2), (4 + step % 2, 6), (step % 2, 7))):
            logistic.observe(seen._replace(step=step))
    found = logistic.predict(3)  # step 99 went to 1, 5 and 1: now come 0, 4 and 0
    likely = [(p.lead_layers, *p.key) for p in found if p.probability > 0.9]
    assert sorted(likely) == [(1, 0, 0), (1, 0, 2), (2, 1, 4), (2, 1, 6), (3, 2, 0), (3, 2, 7)]
    assert all(p.probability < 0.1 for p in found if (p.lead_layers, *p.key) not in likely)


def test_a_prompt_counts_as_the_average_of_its_tokens() -> None:
    logistic = make("logistic(context=1, reach=1, rate=1)")
    for seen in passes(((0, 1), (4, 5), (6, 7))):
        logistic.observe(seen)
    prompt = event(0, (0, 1, 2), step=1, phase=Phase.PREFILL, tokens=(2, 1, 1))
    logistic.observe(prompt)
    predicted = {p.key.expert: p.probability for p in logistic.predict(1)}
    # 0 and 1 got a third of the error each, and the constant too. Here 0 is there fully, 1 and 2 by half.
    once = sigmoid(log_odds(0.25) + (1 + 0.5 + 1) / 3 * 0.75)
    assert predicted[4] == pytest.approx(1 - (1 - once) ** 2, rel=1e-5)  # by one of the two tokens


def test_the_first_layers_are_predicted_at_the_end_of_a_pass_and_nowhere_else() -> None:
    for layers in (1, 2):
        first = make(f"first-layers(layers={layers})")
        for seen in random_events(60):
            first.observe(seen)
            targets = {(p.lead_layers, p.key.layer) for p in first.predict(3)}
            assert targets == {
                (lead, t) for lead in (1, 2, 3) for t in range(layers) if seen.layer + lead == LAYERS + t
            }
