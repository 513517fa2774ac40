"""Fallbacks that have tokens computed by other experts than the router's choice: decided by hand, and live."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import tiny
import torch
from families import families
from logs import first_difference

from cache.errors import PolicyError, UnsupportedFamilyError
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.fallbacks.base import Candidate, Choice, Fallback, Sensitivity, make_fallback
from offload.decide.fallbacks.cache_prior import CachePrior
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks
from offload.layers.prior import reroute
from offload.model import OffloadedModel

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

K = ExpertKey
BUDDY, PRIOR = "buddy(similarity=0)", "cache-prior(strength=1)"
# Of expert 0, expert 2 is the best buddy, then 1; 3 is like nobody.
SIMILARITY = np.array([[[1, 0.4, 0.6, -0.5], [0.4, 1, 0.2, 0], [0.6, 0.2, 1, 0.1], [-0.5, 0, 0.1, 1]]], np.float32)


def buddy(spec: str = "buddy") -> Fallback:
    fallback = make_fallback(spec, 1, 4, 1)
    fallback.learn(Sensitivity(similarity=SIMILARITY))
    return fallback


def test_buddies_are_similar_experts_the_best_first() -> None:
    fallback = buddy()
    assert [fallback.stand_ins(K(0, expert)) for expert in range(4)] == [[K(0, 2), K(0, 1)], [K(0, 0)], [K(0, 0)], []]
    assert buddy("buddy(similarity=.5)").stand_ins(K(0, 0)) == [K(0, 2)]
    assert buddy("buddy(similarity=0)").stand_ins(K(0, 3)) == [K(0, 2), K(0, 1)]


def test_where_there_are_no_buddies_it_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"no two experts of a layer are as similar as 0\.7, the most similar are 0\.60"
    ):
        fallback = buddy("buddy(similarity=.7)")
    assert fallback.stand_ins(K(0, 0)) == []


def test_the_heaviest_expert_is_waited_for() -> None:
    candidates = [Candidate(K(0, i), share, 1 - share, 0, None, (0.0,), K(0, 3)) for i, share in enumerate([0.4, 0.6])]
    event = by_hand.event(0, [0, 1], weights=[0.4, 0.6])
    assert buddy().choose(event, candidates, 0) == [Choice(0, instead=K(0, 3)), Choice(0)]
    assert buddy("buddy(most=1, later=True)").choose(event, candidates, 0) == [Choice(0, True, K(0, 3))] * 2


def manager(fallback: Fallback, slots: int = 4) -> Manager:
    return Manager(Stacks.single([by_hand.cache_of(Tier.CPU, slots, 10, 1, 4)], 10), fallback=fallback)


def carry_out(manager: Manager, event: RoutingEvent) -> Any:
    plan = manager.step(event)
    assert plan.error is None
    for fetch in (*plan.fetches, *plan.late_fetches, *plan.prefetches):
        manager.arrived(fetch, 10)
    manager.finish()
    manager.check_integrity()
    return plan


def test_a_missing_expert_is_replaced_by_a_resident_one() -> None:
    decider = manager(buddy())
    decider.log = log = []
    weights = [0.2, 0.3, 0.5]
    assert carry_out(decider, by_hand.event(0, [1])).replaced == {}  # nothing is resident yet
    plan = carry_out(decider, by_hand.event(0, [0], step=1))
    assert plan.replaced == {}  # it has all the weight
    decider.clear()
    carry_out(decider, by_hand.event(0, [2], step=2))
    plan = carry_out(decider, by_hand.event(0, [3, 0, 1], step=3, weights=weights))
    assert plan.replaced == {K(0, 0): K(0, 2)}  # 1 is too heavy and 3 has no buddy
    assert plan.computed_as(K(0, 0)) == K(0, 2) and plan.computed_as(K(0, 1)) == K(0, 1)
    assert [fetch.key for fetch in plan.fetches] == [K(0, 1), K(0, 3)]
    assert (decider.serving.replaced, decider.serving.uses) == (1, [5])
    assert decider.stats[Tier.CPU].accesses == 6
    assert log[-1].stand_ins == ((K(0, 0), K(0, 2)),)
    again = manager(buddy())
    assert first_difference(log[:2], again) is None
    again.clear()
    assert first_difference(log[2:], again) is None
    decider.reset_stats()
    assert (decider.serving.replaced, decider.serving.uses) == (0, [0])


def test_members_of_the_event_stand_in_for_nobody_and_others_once() -> None:
    decider = manager(buddy("buddy(similarity=0, most=1)"))
    carry_out(decider, by_hand.event(0, [1, 2]))
    plan = carry_out(decider, by_hand.event(0, [0, 2], weights=[0.1, 0.9]))
    assert plan.replaced == {K(0, 0): K(0, 1)}  # 2 is more like it, but used
    plan = carry_out(decider, by_hand.event(0, [0, 3], weights=[0.1, 0.9]))
    assert plan.replaced == {K(0, 3): K(0, 2), K(0, 0): K(0, 1)}  # the heavier one chooses first


def test_what_stands_in_is_not_evicted_meanwhile() -> None:
    decider = manager(buddy("buddy(most=.5)"), slots=1)
    carry_out(decider, by_hand.event(0, [2]))
    plan = carry_out(decider, by_hand.event(0, [0, 3], weights=[0.1, 0.9]))
    assert plan.replaced == {K(0, 0): K(0, 2)}
    assert decider.computing.resident() == [K(0, 2)] and plan.fetches[0].admitted == ()


def test_what_was_replaced_may_be_fetched_behind() -> None:
    decider = manager(buddy("buddy(most=1, later=True)"))
    carry_out(decider, by_hand.event(0, [2]))
    plan = carry_out(decider, by_hand.event(0, [0]))
    assert plan.replaced == {K(0, 0): K(0, 2)} and [fetch.key for fetch in plan.prefetches] == [K(0, 0)]
    assert carry_out(decider, by_hand.event(0, [0])).replaced == {}


def test_the_prior_is_strength_times_the_average_range() -> None:
    prior = CachePrior(2, 4, 1, CachePrior.Params(strength=0.5))
    assert prior.raise_by(0, [2.0, 4.0]) == 1.5
    assert prior.raise_by(0, [6.0]) == 2.0
    assert prior.raise_by(1, [1.0]) == 0.5
    assert prior.raise_by(1, []) == 0.5


@pytest.mark.parametrize(
    ("by", "keep", "taken"),
    [
        (0.0, 0, [0, 1]),
        (1.5, 0, [0, 2]),  # 2.5 beats 2, and not 3
        (4.0, 0, [2, 3]),  # 5 and 4 beat 3
        (4.0, 1, [0, 2]),
        (4.0, 2, [0, 1]),
        (4.0, 9, [0, 1]),
    ],
)
def test_raised_logits_choose(by: float, keep: int, taken: Sequence[int]) -> None:
    logits, resident = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([False, False, True, True])
    assert reroute(logits, torch.tensor([[0, 1]]), resident, by, keep).tolist() == [taken]
    assert reroute(logits, torch.tensor([[1, 0]]), resident, 0.0, keep).tolist() == [[1, 0]]  # as it was
    for nobody in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        assert reroute(logits, torch.tensor([[0, 1]]), nobody, by, keep).tolist() == [[0, 1]]


# Live.


def generated(model: OffloadedModel, steps: int = 16) -> torch.Tensor:
    output = model.generate(
        tiny.ids(1, 5), max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(output.logits)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("routing"), "mixtral", torch.bfloat16)


@pytest.mark.parametrize("fallback", [BUDDY, PRIOR])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_live_some_are_replaced_and_all_is_counted(checkpoint: Path, device: str, fallback: str) -> None:
    with tiny.open_model(checkpoint, device=device) as model:
        plain, slot_bytes = generated(model), model.plan.slot_bytes
    runs = []
    for _ in range(2):
        with tiny.open_model(checkpoint, device=device, fallback=fallback, expert_cache=8 * slot_bytes) as model:
            runs.append(generated(model))
            stats = model.stats
            assert stats.precision_uses["replaced"] > 0
            assert sum(stats.precision_uses.values()) == stats.tiers[stats.computing].counts.accesses
            model.parts.runtime.manager.check_integrity()
    assert runs[0].isfinite().all() and not tiny.same_bits(runs[0], plain)
    assert tiny.same_bits(*runs)


@pytest.mark.parametrize("fallback", [BUDDY, PRIOR])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_where_nothing_is_resident_nothing_is_replaced(checkpoint: Path, device: str, fallback: str) -> None:
    with tiny.open_model(checkpoint, device=device) as model:
        plain = generated(model)
    with tiny.open_model(checkpoint, device=device, fallback=fallback, expert_cache=1) as model:
        assert tiny.same_bits(generated(model), plain)
        assert "replaced" not in model.stats.precision_uses


def test_policies_still_see_the_routers_own_scores(checkpoint: Path) -> None:
    with tiny.open_model(checkpoint, fallback=PRIOR, policy="mrs", expert_cache="100K") as model:
        assert generated(model).isfinite().all()


@pytest.mark.parametrize("fallback", ["buddy", "cache-prior"])
def test_a_lower_precision_makes_no_sense(checkpoint: Path, fallback: str) -> None:
    with pytest.raises(PolicyError, match=f"a --fallback chooses among them, and {fallback} does not"):
        tiny.open_model(checkpoint, experts="auto,nf4", fallback=fallback)


@pytest.mark.parametrize("spec", ["buddy(similarity=2)", "cache-prior(strength=-1)"])
def test_parameters_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(PolicyError, match=r"similarity=2|strength=-1"):
        make_fallback(spec, 1, 4, 1)


@pytest.mark.parametrize("name", ["deepseek_v3", "nemotron_h"])
def test_cache_prior_is_refused_where_a_router_is_not_plain(name: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, name)
    with pytest.raises(PolicyError, match=f'"cache-prior" cannot serve the "{name}" family'):
        tiny.open_model(tmp_path, fallback="cache-prior")


@pytest.mark.full
@pytest.mark.parametrize("fallback", [BUDDY, PRIOR])
@pytest.mark.parametrize("name", families())
def test_every_family_runs_or_is_refused(name: str, fallback: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, name)
    try:
        with tiny.open_model(tmp_path, fallback=fallback, expert_cache="60K") as model:
            assert generated(model, 4).isfinite().all()
    except UnsupportedFamilyError:
        assert families()[name].may_be_refused
    except PolicyError as error:
        assert "cannot serve the" in str(error)
