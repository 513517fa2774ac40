"""Transitions from layer to layer, by hand."""

from __future__ import annotations

import math

import pytest
from workload import event, log_odds, make, passes, random_trace, sigmoid

from cache.errors import PolicyError
from cache.traces.passes import routing_events
from cache.types import ExpertKey
from predictors.base import make_predictor


def test_transitions_add_up_what_each_expert_says() -> None:
    transition = make("transition(reach=1)")
    for seen in passes(((0, 1), (4, 5), (6, 7)), ((0, 2), (4, 6), (6, 7)), ((0, 3), (1, 2), (6, 7))):
        transition.observe(seen)
    transition.observe(event(0, (1, 2), step=3))
    # Layer 1 had three tokens, of which two went to 4; one more counts as gone everywhere alike. Experts 1 and 2 of
    # layer 0 were seen once, before 4 and 5, and before 4 and 6: worth that observation and four of popularity.
    popular = {4: (2 + 0.25) / 4, 5: (1 + 0.25) / 4, 3: 0.25 / 4}
    after_1, after_2 = {4: 1, 5: 1, 3: 0}, {4: 1, 5: 0, 3: 0}
    for expert, share in popular.items():
        rates = [(counts[expert] + 4 * share) / 5 for counts in (after_1, after_2)]
        odds = log_odds(share) + 0.7 * sum(math.log(rate / share) for rate in rates)
        predicted = {p.key: p.probability for p in transition.predict(1)}
        if expert == 3:
            assert ExpertKey(1, expert) not in predicted  # the likeliest four are named
        else:
            assert predicted[ExpertKey(1, expert)] == pytest.approx(sigmoid(odds), rel=1e-5)


def test_transitions_go_on_into_the_next_pass_but_not_into_another_sequence() -> None:
    transition = make("transition")
    for step in range(30):
        for seen in passes(((step % 2, 2), (4, 5), (7 - step % 2, 5))):
            transition.observe(seen._replace(step=step))
    best = {p.lead_layers: p.key for p in reversed(transition.predict(1)) if p.key.expert != 2}
    assert best[1] == ExpertKey(0, 0)  # after 6 came 0, after 7 came 1
    fresh = make("transition")
    for sequence in range(30):
        for seen in passes(((sequence % 2, 2), (4, 5), (7 - sequence % 2, 5)), sequence=sequence):
            fresh.observe(seen)
    probabilities = {p.key.expert: p.probability for p in fresh.predict(1)}
    assert probabilities[0] == pytest.approx(probabilities[1], abs=0.01)


def test_pairs_know_what_single_experts_do_not() -> None:
    """The expert of layer 2 is given by those of layers 0 and 1 together, and by neither alone."""
    experts = [((a,), (b,), (6 if a == b else 7,)) for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)) * 20]
    single, pairs = make("transition"), make("transition(order=2)")
    right = []
    for predictor in (single, pairs):
        for seen in passes(*experts)[:-1]:
            predictor.observe(seen)
        probabilities = {p.key.expert: p.probability for p in predictor.predict(1)}
        right.append(probabilities[6] - probabilities[7])
    assert right[0] == pytest.approx(0, abs=0.05)
    assert right[1] > 0.3


@pytest.mark.parametrize("spec", ["transition", "transition(order=2)"])
def test_a_profile_counts_as_if_it_had_been_watched(spec: str) -> None:
    trace = random_trace()
    watched, trained = make(spec), make(spec, trace)
    for seen in routing_events(trace):
        watched.observe(seen)
    # What came at the very end of the profile is not the beginning of anything.
    for seen in passes(((0, 1), (2, 3), (4, 5)), sequence=7):
        watched.observe(seen)
        trained.observe(seen)
        assert trained.predict(3) == [
            p._replace(probability=pytest.approx(p.probability, rel=1e-5)) for p in watched.predict(3)
        ]


def test_tables_that_take_the_memory_of_experts_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"transition would take 1\.1 GiB for this model, .* now 2, or reach, now 3"):
        make_predictor("transition(order=2)", 48, 128)
    with pytest.raises(PolicyError, match=r"logistic would take 2\.8 GiB .* now 9, or reach, now 6"):
        make_predictor("logistic(context=9, reach=6)", 48, 512)
    with pytest.raises(PolicyError, match="order is 3"):
        make("transition(order=3)")
