"""Where a fallback's threshold is met exactly. All shares are exact in binary."""

from __future__ import annotations

from collections.abc import Sequence

import by_hand

from cache.types import ExpertKey
from offload.decide.fallbacks.base import SKIP, Candidate, make_fallback


def chosen(spec: str, weights: Sequence[float]) -> list[int]:
    """The precision of each of an event's experts, all missing, by ascending weight."""
    total = sum(weights)
    candidates = [
        Candidate(ExpertKey(0, i), weight / total, sum(weights[i + 1 :]) / total, 0, None, (0.0, 0.0))
        for i, weight in enumerate(weights)
    ]
    choices = make_fallback(spec, 1, 8, 2).choose(
        by_hand.event(0, range(len(weights)), weights=weights), candidates, 0.0
    )
    return [choice.precision for choice in choices]


def test_hobbit_goes_up_to_its_thresholds() -> None:
    weights = [1.0, 1.0, 2.0]  # before them lie .75, .5 and 0
    assert chosen("hobbit(t1=.5, t2=.75, skip=True)", weights) == [1, 0, 0]
    assert chosen("hobbit(t1=.49, t2=.74, skip=True)", weights) == [SKIP, 1, 0]


def test_adapmoe_degrades_what_falls_to_its_threshold() -> None:
    weights = [1.0, 1.0]  # (1 - .5)^2 is .25
    assert chosen("adapmoe(threshold=.25)", weights) == [1, 0]
    assert chosen("adapmoe(threshold=.24)", weights) == [0, 0]
