"""D2MoE's bits by router weight, and the order in which planes travel."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import by_hand
import pytest
from several_precisions import LAYERS, Carrier, events, manager_of

from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.fallbacks.base import Candidate, Choice, Fallback, make_fallback
from offload.decide.plan import Fetch

EXPERTS = 8
PLANES = ((0, 1, 2), (0, 1), (0,))
"""Of int4>int3>int2: three slices, the base first."""


def made(spec: str, precisions: int = 3) -> Fallback:
    return make_fallback(spec, LAYERS, EXPERTS, precisions)


def of(weights: Sequence[float], layer: int = 0, tokens: Sequence[int] = ()) -> RoutingEvent:
    """Experts 0, 1, ... by ascending weight."""
    return by_hand.event(layer, range(len(weights)), weights=weights, tokens=tokens)


RANDOM = random.Random(3)
WEIGHTS: dict[str, Callable[[], list[float]]] = {
    "flat": lambda: [0.25] * 4,
    "steep": lambda: [0.001, 0.009, 0.09, 0.9],
    "drifting": lambda: sorted(RANDOM.random() ** RANDOM.randrange(1, 9) + 1e-6 for _ in range(RANDOM.randrange(1, 8))),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("planes", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_mean_of_bits_keeps_to_its_target_whatever_the_weights(kind: str, planes: float) -> None:
    """Three levels have two residual planes; with half of them as many ask for all as for none."""
    fallback = made(f"d2moe(planes={planes})")
    levels = [0, 0, 0]
    for _ in range(1500):
        for target in fallback.targets(of(WEIGHTS[kind]())):
            levels[target] += 1
    uses = sum(levels)
    assert (2 * levels[0] + levels[1]) / 2 / uses == pytest.approx(planes, abs=0.03)
    assert levels[0] / uses == pytest.approx(planes**2, abs=0.03)


def test_more_router_weight_never_asks_for_fewer_bits() -> None:
    fallback = made("d2moe")
    several = 0
    for _ in range(200):
        targets = fallback.targets(of(WEIGHTS["drifting"]()))
        assert targets == sorted(targets, reverse=True)
        several += len(set(targets)) == 3
    assert several > 20


def test_an_expert_gets_the_most_bits_that_any_of_its_tokens_asks_for() -> None:
    """Two tokens need expert 1, which is the weaker one for the first and the only strong one for the second."""
    event = of([0.4, 0.6], tokens=[1, 2])
    totals = made("d2moe").targets(event)
    assert totals[0] > 0 == totals[1]
    assert made("d2moe").targets(event._replace(before=(0.0, 0.9)))[0] == 0
    assert made("d2moe").targets(event._replace(before=(0.9, 0.9))) == [2, 2]


def test_every_layer_has_its_own_thresholds() -> None:
    fallback, alone = made("d2moe"), made("d2moe")
    for _ in range(50):
        fallback.targets(of([0.5, 0.5]))
        fallback.targets(of([0.001, 0.999], layer=1))
        alone.targets(of([0.5, 0.5]))
    assert fallback.targets(of([0.1, 0.9])) == alone.targets(of([0.1, 0.9]))


def test_what_is_held_at_more_bits_is_computed_at_those_asked_for() -> None:
    manager = manager_of(PLANES, [{Tier.CPU: 8}] * 3, made("d2moe(planes=1)"))
    carrier = Carrier(manager, 1)
    carrier.run(of([0.2, 0.8]))
    assert manager.serving.uses == [2, 0, 0]
    manager.serving.fallback = made("d2moe(planes=0)")
    plan = carrier.run(of([0.2, 0.8]))
    assert manager.serving.uses == [2, 0, 2] and len(plan.resident) == 2 and not plan.fetches


def missing(event: RoutingEvent, fetch_s: tuple[float, ...], target: int = 0) -> list[Candidate]:
    return [Candidate(key, 0.1, 0.0, target, None, fetch_s) for key in event.keys]


def test_residual_planes_come_while_the_deadline_permits_the_hottest_first() -> None:
    """Five experts, one second of computing each. Of three that are missing the base planes take 1 s each: 3 s. A plane
    more takes .8 s, and the fourth bit another .7 s. So the hottest gets both, the next one, and the last none."""
    fallback = made("d2moe")
    event = of([1.0, 2.0, 3.0, 4.0, 5.0], tokens=[1, 3, 2, 1, 1])
    candidates = missing(event, (2.5, 1.8, 1.0))[:3]
    choices = fallback.choose(event, candidates, 2.0)
    assert [choice.precision for choice in choices] == [2, 0, 2]
    assert choices[1] == Choice(0)  # 4.5 s; a plane more would arrive at 5.3 s
    assert choices[0].later and choices[2].later  # there is half a second left
    assert [c.precision for c in made("d2moe(patience=.1)").choose(event, candidates, 2.0)] == [2, 0, 1]
    late = fallback.choose(event, missing(event, (9.0, 8.0, 2.0))[:3], 2.0)
    assert late == [Choice(2)] * 3  # base planes alone take longer: no more is fetched, now or later


def test_no_expert_gets_more_bits_than_were_asked_for() -> None:
    event = of([1.0, 2.0])
    assert made("d2moe").choose(event, missing(event, (0.0, 0.0, 0.0), target=1), 9.0) == [Choice(1)] * 2


def fetched(fetches: Sequence[Fetch]) -> list[tuple[int, int]]:
    return [(fetch.key.expert, fetch.slice) for fetch in fetches]


def test_base_planes_travel_first_those_of_the_hottest_leading() -> None:
    """Hot is what has most tokens of the event; of equals, what was used more, and lately."""
    fallback = made("d2moe(planes=1)")
    manager = manager_of(PLANES, [{Tier.CPU: 8}] * 3, fallback)
    for expert in (0, 0, 2, 2):
        fallback.targets(by_hand.event(0, [expert]))
    plan = manager.step(of([1.0, 2.0, 3.0, 4.0], tokens=[1, 2, 1, 1]))
    hottest = (1, 2, 0, 3)
    residual = [(expert, slice_) for expert in hottest for slice_ in (1, 2)]
    assert fetched(plan.fetches) == [*((expert, 0) for expert in hottest), *residual]


def test_older_uses_count_less() -> None:
    fallback = made("d2moe")
    for expert in [0, 0, 0, *[1] * 12]:
        fallback.targets(by_hand.event(0, [expert]))
    assert fallback.hotness(ExpertKey(0, 1)) > fallback.hotness(ExpertKey(0, 0)) > 0
    assert fallback.hotness(ExpertKey(1, 1)) == 0
    assert fallback.hotness(ExpertKey(0, 0)) < 1


def test_planes_of_what_is_staged_stay_together() -> None:
    """With places for one expert the others are staged: what has its base plane there waits for its own next one, and
    for nobody else's."""
    manager = manager_of(PLANES, [{Tier.CPU: 1}] * 3, made("d2moe(planes=1)"))
    plan = manager.step(of([1.0, 2.0, 3.0]))
    order = fetched(plan.fetches)
    staged = {f.key.expert for f in plan.fetches if not f.admitted}
    assert len(staged) >= 2
    for expert in staged:
        first = order.index((expert, 0))
        assert order[first : first + 3] == [(expert, 0), (expert, 1), (expert, 2)]


def test_ahead_comes_the_base_plane() -> None:
    assert made("d2moe").target(ExpertKey(0, 0)) == 2


@pytest.mark.parametrize("spec", ["d2moe", "fate"])
def test_any_event_is_carried_out(spec: str) -> None:
    manager = manager_of(PLANES, [{Tier.CPU: 4}, {Tier.CPU: 3}, {Tier.CPU: 2}], made(spec))
    carrier = Carrier(manager, 7)
    for i, event in enumerate(events(150, 11)):
        carrier.run(event._replace(phase=Phase.DECODE if i % 3 else Phase.PREFILL))
    carrier.settle()
    assert all(manager.serving.uses[precision] for precision in (0, 2))


def test_fate_reads_prompts_with_few_bits_for_the_least_popular_quarter() -> None:
    """Of eight experts two: those with the fewest tokens, and of equals those with the least weight."""
    fallback = made("fate", 2)
    event = of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], tokens=[2, 9, 2, 9, 1, 9, 9, 9])
    prompt = event._replace(phase=Phase.PREFILL)
    assert fallback.targets(prompt) == [1, 0, 0, 0, 1, 0, 0, 0]
    assert fallback.targets(event) == [0] * 8
    assert made("fate(share=.5)", 2).targets(prompt) == [1, 1, 1, 0, 1, 0, 0, 0]
    assert fallback.targets(prompt._replace(experts=(1, 2, 3), weights=(1.0,) * 3, tokens=(1,) * 3)) == [0] * 3


def test_fate_degrades_residents_and_missing_experts_alike() -> None:
    manager = manager_of(((0, 1), (0,)), [{Tier.CPU: 8}] * 2, made("fate", 2))
    carrier = Carrier(manager, 1)
    event = of([1.0, 2.0, 3.0, 4.0], tokens=[5, 1, 5, 5])
    for _ in range(2):
        plan = carrier.run(event._replace(phase=Phase.PREFILL))
        assert plan.precisions == {ExpertKey(0, 1): 1}
    assert carrier.run(event).precisions == {}
