"""What predictors work out for many layers at once is what their rules say of one expert after the other."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workload import random_events

from cache.types import Phase, RoutingEvent
from predictors.base import Predictor, make_predictor
from predictors.expert_map import highest
from predictors.ranking import Tokens, ranked_each

CHANCES = st.sampled_from([0.0, 0.25, 0.5, 1.0])
SHAPES = {"layers": st.integers(1, 5), "experts": st.integers(4, 9), "seed": st.integers(0, 999)}


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=4, max_size=4), min_size=1), st.integers(0, 5)
)
def test_several_layers_are_ranked_as_each_alone(rows: list[list[float]], most: int) -> None:
    layers = range(len(rows))
    plain = [
        ((layer, expert), row[expert], 7 + layer)
        for layer, row in enumerate(rows)
        for expert in sorted(range(4), key=lambda expert: -row[expert])[:most]
        if row[expert]
    ]
    assert ranked_each(layers, [7 + layer for layer in layers], np.array(rows), most) == plain


@given(st.lists(CHANCES, min_size=1), st.integers(1, 9))
def test_the_highest_are_those_of_a_whole_sort(values: list[float], count: int) -> None:
    plain = sorted(range(len(values)), key=lambda place: -values[place])[:count]
    assert highest(np.array(values), count).tolist() == plain


def checked(predictor: Predictor, events: list[RoutingEvent], plain: Plain) -> None:
    """After each event both give every expert that is named the same probability, and the same number of them."""
    tokens = Tokens()
    for event in events:
        count = tokens.of(event)
        predictor.observe(event)
        plain.observe(event, count, tokens.share(predictor.num_experts))
        found = predictor.predict(predictor.num_layers)
        for lead in range(1, predictor.num_layers + 1):
            layer = (event.layer + lead) % predictor.num_layers
            named = {p.key.expert: p.probability for p in found if p.lead_layers == lead}
            alone = plain.needs(layer, lead)
            same = event.layer + lead < predictor.num_layers or event.phase is Phase.DECODE
            needs = [1 - (1 - need) ** (count if same else 1) for need in alone]
            assert len(named) == min(sum(need > 0 for need in needs), 2 * len(event.experts)) * bool(alone)
            assert named == {expert: pytest.approx(needs[expert], rel=2e-3, abs=1e-6) for expert in named}
            if named:
                others = [need for expert, need in enumerate(needs) if expert not in named]
                assert min(named.values()) >= max(others, default=0) - 1e-5


class Plain:
    """A predictor without arrays; of layers of which it says nothing it knows no needs."""

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts
        self.history: list[tuple[RoutingEvent, int]] = []  # of the sequence, the last one first

    def observe(self, event: RoutingEvent, count: int, share: float) -> None:
        """An event of so many tokens; `share` is how likely any expert is needed."""
        self.share = share
        if self.history and self.history[0][0].sequence != event.sequence:
            self.history.clear()
        self.learn(event, count)
        self.history.insert(0, (event, count))

    def learn(self, event: RoutingEvent, count: int) -> None:
        raise NotImplementedError

    def needs(self, layer: int, lead: int) -> list[float]:
        raise NotImplementedError


class PlainFrequency(Plain):
    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.uses: dict[tuple[int, int], float] = defaultdict(float)
        self.seen: dict[int, float] = defaultdict(float)

    def learn(self, event: RoutingEvent, count: int) -> None:
        for used in range(count):  # one token after the other, each with its part of all uses
            for expert in range(self.experts):
                tokens = dict(zip(event.experts, event.tokens, strict=True)).get(expert, 0)
                self.uses[event.layer, expert] = 0.9 * self.uses[event.layer, expert] + tokens / count
            self.seen[event.layer] = 0.9 * self.seen[event.layer] + 1
            del used

    def needs(self, layer: int, lead: int) -> list[float]:
        return [self.uses[layer, expert] / (self.seen[layer] + 1) for expert in range(self.experts)]


class PlainTransition(Plain):
    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.uses: dict[tuple[int, int], float] = defaultdict(float)
        self.tokens: dict[int, float] = defaultdict(float)
        self.followed: dict[tuple[int, int, int, int], float] = defaultdict(float)
        self.seen: dict[tuple[int, int, int], float] = defaultdict(float)

    def learn(self, event: RoutingEvent, count: int) -> None:
        for expert, tokens in zip(event.experts, event.tokens, strict=True):
            self.uses[event.layer, expert] += tokens
        self.tokens[event.layer] += count
        for distance, (before, alone) in enumerate(self.history[: min(3, self.layers)], 1):
            if count == alone == 1:
                for key in before.experts:
                    self.seen[distance, event.layer, key] += 1
                    for expert in event.experts:
                        self.followed[distance, event.layer, key, expert] += 1

    def needs(self, layer: int, lead: int) -> list[float]:
        if lead > 3:
            return []
        event, count = self.history[0]
        found = []
        for expert in range(self.experts):
            popular = min((self.uses[layer, expert] + self.share) / (self.tokens[layer] + 1), 1 - 1e-6)
            odds = math.log(popular) - math.log1p(-popular)
            for key, tokens in zip(event.experts, event.tokens, strict=True):
                rate = self.followed[lead, layer, key, expert] + 4 * popular
                rate /= self.seen[lead, layer, key] + 4
                odds += 0.7 * (math.log(rate) - math.log(popular)) * (tokens / count)
            found.append(1 / (1 + math.exp(-max(odds, -80))))
        return found


class PlainLogistic(Plain):
    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.weights: dict[tuple[int, int, object, int], float] = defaultdict(float)
        self.said: dict[tuple[int, int], tuple[dict[object, float], list[float]]] = {}  # lead, layer: inputs, needs

    def learn(self, event: RoutingEvent, count: int) -> None:
        if not self.history:
            self.said.clear()
        used = dict(zip(event.experts, event.tokens, strict=True))
        for lead in range(1, 4):
            inputs, needs = self.said.pop((lead, event.layer), ({}, []))
            size = sum(amount**2 for amount in inputs.values())
            for expert, need in enumerate(needs):
                step = 1.6 / size * ((used[expert] / count if expert in used else 0) - need)
                for each, amount in inputs.items():
                    self.weights[lead, event.layer, each, expert] += amount * step

    def observe(self, event: RoutingEvent, count: int, share: float) -> None:
        super().observe(event, count, share)
        for lead in range(1, min(3, self.layers) + 1):
            places = [(str(back), back) for back in range(min(3, self.layers))] + [("own", self.layers - lead)]
            inputs: dict[object, float] = {"constant": 1.0}
            for name, back in places:
                if back < len(self.history):
                    before, tokens = self.history[back]
                    inputs |= {(name, e): n / tokens for e, n in zip(before.experts, before.tokens, strict=True)}
            layer = (event.layer + lead) % self.layers
            self.said[lead, layer] = inputs, [self.need(lead, layer, inputs, e) for e in range(self.experts)]

    def need(self, lead: int, layer: int, inputs: dict[object, float], expert: int) -> float:
        odds = sum(amount * self.weights[lead, layer, each, expert] for each, amount in inputs.items())
        return 1 / (1 + math.exp(-max(odds + math.log(self.share / (1 - self.share)), -80)))

    def needs(self, layer: int, lead: int) -> list[float]:
        return self.said[lead, layer][1] if lead <= 3 else []


@pytest.mark.parametrize(
    ("name", "plain"), [("frequency", PlainFrequency), ("transition", PlainTransition), ("logistic", PlainLogistic)]
)
@settings(max_examples=20, deadline=None)
@given(**SHAPES)
def test_a_predictor_is_its_plain_form(name: str, plain: type[Plain], layers: int, experts: int, seed: int) -> None:
    events = random_events(24 * layers, seed, layers, experts)
    checked(make_predictor(name, layers, experts), events, plain(layers, experts))
