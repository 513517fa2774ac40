"""Each predictor against figures worked out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from workload import EXPERTS, LAYERS, event, passes, random_events, random_trace, trace_of

from cache.errors import PolicyError
from cache.traces.passes import batches, routing_events
from cache.traces.trace import Trace
from cache.types import ExpertKey, Phase, RoutingEvent
from predictors.base import Prediction, Predictor, make_predictor


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


# Transitions


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def sigmoid(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


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


# Regressions


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


# What recorded sequences and passes did


def test_without_a_profile_the_sequence_is_its_own_activation_matrix() -> None:
    matrix = make("activation-matrix")
    for seen in passes(((0, 1), (4, 5), (6, 7)), ((0, 2), (4, 5), (6, 7)), ((0, 3), (4, 5), (6, 7))):
        matrix.observe(seen)
    assert said(matrix) == {ExpertKey(0, 0): 3 / 4, **{ExpertKey(0, expert): 1 / 4 for expert in (1, 2, 3)}}
    matrix.observe(event(0, (5, 6), sequence=1))
    assert matrix.predict(2) == []  # a new sequence


def test_the_nearest_activation_matrix_says_what_comes() -> None:
    one = (((0, 1), (0, 1), (2, 3)), ((0, 1), (0, 1), (2, 4)))
    other = (((0, 2), (6, 7), (6, 7)), ((0, 1), (6, 7), (6, 7)))
    matrix = make("activation-matrix", trace_of(*one, *other, offsets=(0, 2, 4)))
    matrix.observe(event(0, (0, 1)))  # nothing to compare: both sequences together
    assert said(matrix) == {ExpertKey(1, expert): 0.5 for expert in (0, 1, 6, 7)}
    matrix.observe(event(1, (7, 6)))
    matrix.observe(event(0, (0, 1), step=1))
    assert said(matrix, 2) == {ExpertKey(layer, expert): 1.0 for layer in (1, 2) for expert in (6, 7)}
    matrix.observe(event(2, (2, 3), step=1))
    assert said(matrix) == {ExpertKey(0, 0): 1.0, ExpertKey(0, 1): 0.5, ExpertKey(0, 2): 0.5}


def test_the_nearest_expert_maps_are_asked() -> None:
    tokens = (((0, 1), (2, 3), (4, 5)), ((0, 1), (2, 6), (4, 7)), ((6, 7), (2, 3), (5, 6)))
    one, two = make("expert-map(nearest=1)", trace_of(*tokens)), make("expert-map(nearest=2)", trace_of(*tokens))
    for maps in (one, two):
        maps.observe(event(0, (0, 1)))
    assert said(one) == {ExpertKey(1, 2): 1.0, ExpertKey(1, 3): 1.0}
    assert said(two) == {ExpertKey(1, 2): 1.0, ExpertKey(1, 3): 0.5, ExpertKey(1, 6): 0.5}
    for maps in (one, two):
        maps.observe(event(1, (2, 6)))
    assert said(one) == {ExpertKey(2, 4): 1.0, ExpertKey(2, 7): 1.0}  # now only the second is like it
    one.observe(event(2, (4, 7)))
    assert said(one) == {ExpertKey(0, 0): 1.0, ExpertKey(0, 1): 1.0}


def test_expert_maps_go_by_scores_where_there_are_some() -> None:
    scores = np.zeros((2, LAYERS, EXPERTS), np.float16)
    scores[0, 0, :3], scores[1, 0, :3] = (5, 4, 3), (5, 4, -3)
    trace = replace(trace_of(((0, 1), (2, 3), (4, 5)), ((0, 1), (6, 7), (4, 5))), scores=scores)
    maps = make("expert-map(nearest=1)", trace)
    maps.observe(event(0, (0, 1), scores=scores[1, 0].astype(np.float32)))
    assert {key.expert for key in said(maps)} == {0, 1}  # of layer 1 all scores are equal, and the first ones win


# The ensemble


class Stubborn(Predictor):
    """Always says the same: expert 0 with .9, expert 1 with .2."""

    def observe(self, event: RoutingEvent) -> None:
        self.layer = event.layer

    def predict(self, depth: int) -> list[Prediction]:
        return [
            Prediction(ExpertKey((self.layer + lead) % self.num_layers, expert), probability, lead)
            for lead in range(1, depth + 1)
            for expert, probability in ((0, 0.9), (1, 0.2))
        ]


class Contrary(Stubborn):
    """The other way round, and only one layer ahead."""

    def predict(self, depth: int) -> list[Prediction]:
        layer = (self.layer + 1) % self.num_layers
        return [Prediction(ExpertKey(layer, expert), p, 1) for expert, p in ((1, 0.9), (0, 0.2))]


PARTS = '"test_predictor_examples:Stubborn", "test_predictor_examples:Contrary"'


def test_an_ensemble_starts_with_the_mean_of_its_parts_and_comes_to_believe_the_better_one() -> None:
    both = make(f"ensemble(parts=({PARTS}))")
    both.observe(event(0, (1, 7)))
    mean = sigmoid((log_odds(0.9) + log_odds(0.2)) / 2)
    assert said(both, 2) == {
        ExpertKey(1, 0): mean,
        ExpertKey(1, 1): mean,
        ExpertKey(2, 0): 0.9,  # only one of them speaks of that layer
        ExpertKey(2, 1): 0.2,
    }
    for step in range(200):
        for layer in range(LAYERS):
            both.observe(event(layer, (1, 7), step=step))
    probabilities = {p.key.expert: p.probability for p in both.predict(1)}
    assert probabilities[1] > 0.9 and probabilities[0] < 0.1
    assert {p.key.expert: p.probability > 0.5 for p in both.predict(2) if p.lead_layers == 2} == {1: True, 0: False}


def test_an_ensemble_asks_for_what_its_parts_ask_for() -> None:
    assert make("ensemble").looks_ahead and not make("ensemble").learns
    assert not make('ensemble(parts=("frequency", "transition"))').looks_ahead
    with pytest.raises(PolicyError, match='"ensemble" learns from a recorded trace'):
        make('ensemble(parts=("frequency", "expert-map"))')
    with pytest.raises(PolicyError, match="oracle asks for the future"):
        make('ensemble(parts=("oracle", "frequency"))')
    with pytest.raises(PolicyError, match="a tuple of names is needed"):
        make('ensemble(parts="frequency")')
    with pytest.raises(PolicyError, match='no predictor is called "gate"'):
        make('ensemble(parts=("gate",))')
