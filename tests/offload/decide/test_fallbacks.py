"""Which precision serves a miss: each rule on events worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import by_hand
import pytest

from cache.errors import PolicyError
from cache.types import ExpertKey, RoutingEvent
from offload.decide.fallbacks.base import SKIP, Candidate, Choice, Fallback, Sensitivity, find_fallback, make_fallback

LAYERS, EXPERTS = 2, 8


def made(spec: str, precisions: int = 2) -> Fallback:
    return make_fallback(spec, LAYERS, EXPERTS, precisions)


def event(weights: Sequence[float], layer: int = 0) -> RoutingEvent:
    """Experts 0, 1, ... by ascending weight."""
    return by_hand.event(layer, range(len(weights)), weights=weights)


def missing(
    weights: Sequence[float],
    which: Sequence[int],
    fetch_s: tuple[float, ...] = (0.0, 0.0),
    held: int | None = None,
    layer: int = 0,
) -> list[Candidate]:
    total = sum(weights)
    return [
        Candidate(ExpertKey(layer, i), weights[i] / total, sum(weights[i + 1 :]) / total, 0, held, fetch_s)
        for i in which
    ]


def precisions(choices: Sequence[Choice]) -> list[int]:
    return [choice.precision for choice in choices]


def test_names() -> None:
    names = ("none", "hobbit", "adapmoe", "edgemoe", "resident-low", "deadline", "d2moe", "fate")
    assert [find_fallback(name).name for name in names] == list(names)


@pytest.mark.parametrize("spec", ["none", "hobbit", "adapmoe", "resident-low", "deadline", "d2moe", "fate"])
def test_every_rule_answers_for_every_candidate(spec: str) -> None:
    weights = [0.1, 0.2, 0.3, 0.4]
    fallback = made(spec)
    for which in ([0], [1, 3], [0, 1, 2, 3]):
        choices = fallback.choose(event(weights), missing(weights, which), 0.01)
        assert len(choices) == len(which) and all(choice.precision in (SKIP, 0, 1) for choice in choices)
        assert choices == made(spec).choose(event(weights), missing(weights, which), 0.01)


def test_none_waits() -> None:
    weights = [0.1, 0.9]
    assert made("none").choose(event(weights), missing(weights, [0, 1]), 1.0) == [Choice(0), Choice(0)]


def test_hobbit_goes_by_the_weight_before() -> None:
    """Weights .1 .2 .3 .4: before them lie .9, .7, .4 and 0."""
    weights = [0.1, 0.2, 0.3, 0.4]
    candidates = missing(weights, [0, 1, 2, 3])
    assert precisions(made("hobbit").choose(event(weights), candidates, 0)) == [1, 1, 0, 0]
    assert precisions(made("hobbit(skip=True, t2=.8)").choose(event(weights), candidates, 0)) == [SKIP, 1, 0, 0]
    assert precisions(made("hobbit(t1=.3, t2=1)", 3).choose(event(weights), candidates, 0)) == [2, 2, 2, 0]


def test_adapmoe_weighs_layers() -> None:
    """Weights .2 .3 .5: (1 - .8)^2 = .04, (1 - .5)^2 = .25, and the strongest is never degraded."""
    weights = [0.2, 0.3, 0.5]
    fallback = made("adapmoe(threshold=.05)")
    assert precisions(fallback.choose(event(weights), missing(weights, [0, 1, 2]), 0)) == [1, 0, 0]
    fallback.learn(Sensitivity(layers=[1.8, 0.1]))
    assert precisions(fallback.choose(event(weights), missing(weights, [0, 1, 2]), 0)) == [0, 0, 0]
    choices = fallback.choose(event(weights, layer=1), missing(weights, [0, 1, 2], layer=1), 0)
    assert precisions(choices) == [1, 1, 0]


def test_edgemoe_degrades_what_matters_least() -> None:
    """Of importances 1 to 16, sum 136, a budget of 10 % is 13.6: 1 + 3 + 4 + 5 fit, and no more; 2 is a super expert,
    which costs nothing, since it stays."""
    importance = {
        ExpertKey(layer, expert): float(1 + layer * EXPERTS + expert)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }
    fallback = made("edgemoe(loss=.1)")
    fallback.learn(Sensitivity(importance=importance, super_experts={ExpertKey(0, 1)}))
    low = [key for key in importance if fallback.target(key) == 1]
    assert low == [ExpertKey(0, expert) for expert in (0, 2, 3, 4)]
    with pytest.raises(PolicyError, match="run `offload calibrate` first"):
        made("edgemoe").learn(Sensitivity())


def test_edgemoe_spends_a_budget_in_the_unit_of_importances() -> None:
    """The least important come first, whatever their layer, until the next would go over the budget; ties by layer and
    id. A budget that is met exactly is kept to."""
    importance = dict(
        zip((ExpertKey(0, 3), ExpertKey(1, 0), ExpertKey(0, 0), ExpertKey(1, 7)), (0.5, 0.25, 0.25, 2.0), strict=True)
    )
    ascending = [ExpertKey(0, 0), ExpertKey(1, 0), ExpertKey(0, 3), ExpertKey(1, 7)]
    for most, count in ((0, 0), (0.24, 0), (0.25, 1), (0.99, 2), (1, 3), (2.9, 3), (3, 4)):
        fallback = made(f"edgemoe(most={most})")
        fallback.learn(Sensitivity(importance=importance))
        assert [key for key in ascending if fallback.target(key) == 1] == ascending[:count]


def test_resident_low_never_waits() -> None:
    weights = [0.4, 0.6]
    assert made("resident-low").choose(event(weights), missing(weights, [0, 1]), 0) == [Choice(1, True)] * 2
    assert type(made("resident-low")).keeps_low


def test_deadline_takes_what_arrives_in_time() -> None:
    """Three of six experts are there, a second each: three seconds to hide transfers behind, and one for each that
    has come. The best form takes two seconds and the low one a half."""
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    fallback = made("deadline(patience=0)")
    choices = fallback.choose(event(weights), missing(weights, [0, 1, 2], (2.0, 0.5)), 3.0)
    # Expert 2: 2 <= 3. Expert 1: 4 <= 4. Expert 0: 6 > 5, but 4.5 <= 5.
    assert precisions(choices) == [1, 0, 0]
    assert choices[0].later and not choices[1].later
    held = missing(weights, [0, 1, 2], (9.0, 0.0), held=1)
    assert precisions(fallback.choose(event(weights), held, 3.0)) == [1, 1, 1]
    patient = made("deadline(patience=10)")
    assert precisions(patient.choose(event(weights), held, 3.0)) == [0, 0, 0]


def test_deadline_takes_the_soonest_where_nothing_is_in_time() -> None:
    weights = [1.0, 2.0]
    choices = made("deadline(patience=0)", 3).choose(event(weights), missing(weights, [0, 1], (9.0, 4.0, 2.0)), 0.0)
    assert precisions(choices) == [2, 2] and not any(choice.later for choice in choices)


@pytest.mark.parametrize(
    "spec",
    [
        *("hobbit(t1=.9, t2=.1)", "hobbit(low_share=0)", "hobbit(low_share=1.5)", "nobody", "hobbit(x=1)"),
        *("d2moe(planes=1.1)", "d2moe(rate=0)", "fate(share=-.1)", "edgemoe(most=-1)", "edgemoe(loss=-1)"),
    ],
)
def test_nonsense_is_refused(spec: str) -> None:
    with pytest.raises(PolicyError):
        made(spec)
