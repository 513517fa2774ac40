"""A decision has all that a plan says: what it left out, no comparison of logs would notice."""

from __future__ import annotations

import by_hand

from cache.types import ExpertKey, Tier
from offload.decide.log import Decision, FetchDecision
from offload.decide.plan import Fetch, LayerPlan

K = ExpertKey


def test_a_decision_is_all_of_a_plan() -> None:
    event = by_hand.event(0, range(6))
    plan = LayerPlan(event)
    plan.resident = [K(0, 0), K(0, 3)]
    plan.awaited = [K(0, 1)]
    plan.fetches = [Fetch(K(0, 2), Tier.DISK, (Tier.CPU,), {Tier.CPU: [K(1, 7)]}, slice=1, to_host=True)]
    plan.late_fetches = [Fetch(K(0, 1), Tier.CPU, (Tier.GPU,), {Tier.GPU: [K(0, 0)]})]
    plan.prefetches = [Fetch(K(1, 5), Tier.DISK)]
    plan.cancelled = [Fetch(K(1, 6), Tier.CPU)]
    plan.on_cpu = [K(0, 2)]
    plan.precisions = {K(0, 2): 1}
    plan.skipped = [K(0, 4)]
    plan.replaced = {K(0, 3): K(0, 7)}
    assert Decision.of(plan) == Decision(
        event=event,
        resident=(K(0, 0), K(0, 3)),
        fetches=(
            FetchDecision(
                K(0, 2), Tier.DISK, (Tier.CPU,), ((Tier.CPU, (K(1, 7),)),), late=False, slice=1, to_host=True
            ),
            FetchDecision(K(0, 1), Tier.CPU, (Tier.GPU,), ((Tier.GPU, (K(0, 0),)),), True),
        ),
        awaited=(K(0, 1),),
        prefetches=(FetchDecision(K(1, 5), Tier.DISK, (), (), False),),
        cancelled=(K(1, 6),),
        below_best=((K(0, 2), 1), (K(0, 4), -1)),
        stand_ins=((K(0, 3), K(0, 7)),),
        on_cpu=(K(0, 2),),
    )
