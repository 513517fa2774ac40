"""Made-up routing for predictors: events with looks ahead, and traces to learn from; and what predictors say."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from cache.traces.trace import Trace
from cache.types import ExpertKey, Phase, RoutingEvent
from predictors.base import Predictor, make_predictor

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def event(layer: int, experts: tuple[int, ...], **fields: object) -> RoutingEvent:
    """One token's event; step 0 of sequence 0 unless stated otherwise."""
    made = RoutingEvent(0, 0, layer, Phase.DECODE, experts, (0.5,) * len(experts), (1,) * len(experts))
    return made._replace(**fields)  # type: ignore[arg-type]


def passes(*experts: tuple[tuple[int, ...], ...], sequence: int = 0) -> list[RoutingEvent]:
    """The events of a sequence of one-token passes, each given as the experts of its layers."""
    return [
        event(layer, needed, sequence=sequence, step=step)
        for step, layers in enumerate(experts)
        for layer, needed in enumerate(layers)
    ]


def random_events(count: int, seed: int = 0, layers: int = LAYERS, experts: int = EXPERTS) -> list[RoutingEvent]:
    """Sequences of ten passes, the first one of several tokens; what is said ahead is half right."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        step, layer = divmod(i, layers)
        prompt = step % 10 == 0
        chosen = tuple(rng.sample(range(experts), rng.randint(TOP_K, experts) if prompt else TOP_K))
        tokens = tuple(rng.randint(1, 5) if prompt else 1 for _ in chosen)
        ahead = tuple(tuple(rng.sample(range(experts), 2 * TOP_K)) for _ in range(min(2, layers - 1 - layer)))
        phase = Phase.PREFILL if prompt else Phase.DECODE
        weights = tuple(sorted(rng.random() for _ in chosen))
        made.append(RoutingEvent(step // 10, step % 10, layer, phase, chosen, weights, tokens, ahead))
    return made


def trace_of(
    *tokens: tuple[tuple[int, ...], ...], offsets: tuple[int, ...] | None = None, experts: int = EXPERTS
) -> Trace:
    """Tokens as single passes, each given as the experts of its layers."""
    ids = np.array(tokens)
    return Trace.from_arrays(ids, np.full(ids.shape, 0.5), offsets or (0, len(ids)), num_experts=experts)


def random_trace(seed: int = 1, lengths: tuple[int, ...] = (20, 40)) -> Trace:
    """A profile of the shape of `random_events`."""
    rng = np.random.default_rng(seed)
    shape = sum(lengths), LAYERS, EXPERTS
    ids = np.argsort(rng.random(shape) * np.arange(1, EXPERTS + 1), axis=2)[:, :, :TOP_K]
    return Trace.from_arrays(ids, np.full(ids.shape, 0.5), np.cumsum([0, *lengths]), num_experts=EXPERTS)


def make(spec: str, profile: Trace | None = None) -> Predictor:
    """A predictor for `LAYERS` layers of `EXPERTS` experts."""
    return make_predictor(spec, LAYERS, EXPERTS, profile)


def said(predictor: Predictor, depth: int = 1) -> dict[ExpertKey, float]:
    """The probabilities that it gives, to be compared with."""
    return {p.key: pytest.approx(p.probability) for p in predictor.predict(depth)}


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def sigmoid(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))
