"""Fallbacks that judge single tokens: HOBBIT's scores, AdapMoE's gating, MoE-Spec's budget; on tokens made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import by_hand
import numpy as np
import pytest
from several_precisions import manager_of

from cache.errors import PolicyError
from cache.traces.by_token import Routed
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.fallbacks.base import Fallback, Sensitivity, make_fallback
from offload.decide.manager import Manager

K = ExpertKey
WEIGHTS = [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]]
EXPERTS = [[0, 1, 2], [2, 1, 3]]


def made(spec: str, experts: int = 8) -> Fallback:
    return make_fallback(spec, 3, experts, 2)


def routed(
    experts: Sequence[Sequence[int]] = EXPERTS,
    weights: Sequence[Sequence[float]] = WEIGHTS,
    layer: int = 0,
    continues: bool = True,
) -> Routed:
    return Routed(layer, np.array(experts), np.array(weights), continues)


def empty(spec: str, **more: Any) -> Manager:
    """With nothing resident, and room for everything at both precisions."""
    return manager_of(((0,), (1,)), [{Tier.CPU: 24}, {Tier.CPU: 24}], make_fallback(spec, 3, 8, 2), **more)


def event(before: Sequence[float] = ()) -> RoutingEvent:
    """Two tokens' experts, by ascending total weight."""
    totals, tokens = {3: 0.1, 1: 0.5, 0: 0.5, 2: 0.9}, (1, 2, 1, 2)
    return by_hand.event(0, [*totals], weights=[*totals.values()], tokens=tokens)._replace(before=tuple(before))


def test_hobbit_serves_an_expert_as_the_token_that_needs_it_most_asks_for() -> None:
    """Expert 3 has .9 before it, 1 .5 and .7, 0 nothing, 2 .8 and nothing."""
    plan = empty("hobbit(t1=.6, t2=.85, skip=True)").step(event([0.9, 0.5, 0.0, 0.0]))
    assert plan.skipped == [K(0, 3)] and not plan.precisions
    plan = empty("hobbit(t1=.4, t2=.85, skip=True)").step(event([0.9, 0.5, 0.0, 0.0]))
    assert plan.skipped == [K(0, 3)] and plan.precisions == {K(0, 1): 1}


def test_hobbit_leaves_out_only_what_every_token_would() -> None:
    """By the event's totals, .95 of 2 is before expert 3 and .7 before 1; its two tokens say .88 and .6 at most."""
    by_totals = empty("hobbit(t1=.6, t2=.9, skip=True)").step(event())
    by_token = empty("hobbit(t1=.6, t2=.9, skip=True)").step(event([0.88, 0.6, 0.0, 0.0]))
    assert by_totals.skipped == [K(0, 3)] and by_totals.precisions == {K(0, 1): 1}
    assert by_token.skipped == [] and by_token.precisions == {K(0, 3): 1}


def test_adapmoe_drops_what_matters_little_to_a_token_whether_it_is_there_or_not() -> None:
    """What a token loses with its second and third expert: (.5, .2) and (.3, .1), squared."""
    assert made("adapmoe(threshold=.05, skip=True)").keep(routed()).tolist() == [
        [True, True, False],
        [True, True, False],
    ]
    assert made("adapmoe(threshold=.1, skip=True)").keep(routed()).tolist() == [
        [True, True, False],
        [True, False, False],
    ]
    assert made("adapmoe(threshold=9, skip=True)").keep(routed()).sum(-1).tolist() == [1, 1]
    assert made("adapmoe(threshold=0, skip=True)").keep(routed()).all()
    assert not made("adapmoe").gates and made("adapmoe").by_token


def test_adapmoe_goes_by_the_sensitivity_to_what_it_does() -> None:
    measured = Sensitivity(layers=[1.0, 0.1], unscaled=[0.1, 3.0])
    scaled, plain = (
        made("adapmoe(threshold=.05, skip=True)"),
        made("adapmoe(threshold=.05, skip=True, renormalise=False)"),
    )
    for fallback in (scaled, plain):
        fallback.learn(measured)
    kept = [[int(each.keep(routed(layer=layer)).sum()) for layer in (0, 1)] for each in (scaled, plain)]
    assert kept == [[4, 2], [2, 5]]
    assert scaled.renormalises and not plain.renormalises and not made("adapmoe").renormalises
    with pytest.warns(UserWarning, match="run `offload calibrate` again"):
        plain.learn(Sensitivity(layers=[1.0, 0.1]))
    assert plain.keep(routed(layer=1)).sum() == 4


def test_moe_spec_keeps_the_experts_with_the_most_weight_of_all_tokens() -> None:
    """Totals are .5, .5, .9 and .1; of equals the higher id stays."""
    kept = made("moe-spec(budget=2)").keep(routed())
    assert kept.tolist() == [[False, True, True], [True, True, False]]
    assert made("moe-spec(budget=1)").keep(routed()).tolist() == [[False, False, True], [True, False, False]]
    assert made("moe-spec", experts=4).keep(routed()).sum() == 4  # half of a layer's
    assert made("moe-spec(budget=4)").keep(routed()).all()


def test_moe_spec_leaves_prompts_and_single_tokens_alone() -> None:
    one = routed(EXPERTS[:1], WEIGHTS[:1])
    assert made("moe-spec(budget=1)").keep(one).all()
    assert made("moe-spec(budget=1)").keep(routed(continues=False)).all()
    assert made("moe-spec(budget=1, all_passes=True)").keep(routed(continues=False)).sum() == 2
    assert made("moe-spec(budget=1, all_passes=True)").keep(one).all()


def test_a_budget_that_holds_a_layer_is_said_to_do_nothing() -> None:
    with pytest.warns(UserWarning, match=r"moe-spec\(budget=8\) drops nothing: a layer has 8 experts"):
        made("moe-spec(budget=8)").learn(Sensitivity())
    with pytest.raises(PolicyError, match="budget=-1"):
        made("moe-spec(budget=-1)")


def test_super_experts_are_never_dropped() -> None:
    manager = empty("moe-spec(budget=1)", super_experts=[K(0, 0), K(1, 1)])
    by_token = manager.serving.by_token
    assert by_token is not None and by_token.keep is not None
    kept = by_token.keep(routed())
    assert kept is not None and kept.tolist() == [[True, False, True], [True, False, False]]


def test_what_is_dropped_is_counted() -> None:
    manager = empty("moe-spec(budget=1)")
    manager.step(event()._replace(dropped=3))
    assert (manager.serving.dropped, manager.serving.routed, manager.serving.dropped_share) == (3, 9, 1 / 3)
    manager.reset_stats()
    assert manager.serving.dropped_share == 0
    other = empty("hobbit")
    other.step(event())
    assert other.serving.routed == 0


@pytest.mark.parametrize("answer", [np.zeros((2, 3), bool), np.ones((3, 2), bool), np.ones((2, 3))])
def test_an_answer_that_is_none_is_refused(answer: Any) -> None:
    class Wrong(type(made("moe-spec"))):  # type: ignore[misc]
        def keep(self, routed: Routed) -> Any:
            return answer

    manager = manager_of(((0,), (1,)), [{Tier.CPU: 24}, {Tier.CPU: 24}], Wrong(3, 8, 2))
    by_token = manager.serving.by_token
    assert by_token is not None and by_token.keep is not None
    with pytest.raises(PolicyError, match="fallback Wrong kept"):
        by_token.keep(routed())


def test_rules_that_judge_no_tokens_ask_nothing_of_them() -> None:
    for spec in ("none", "edgemoe", "resident-low", "deadline"):
        assert empty(spec).serving.by_token is None
    assert Manager(empty("none").stacks).serving.by_token is None
