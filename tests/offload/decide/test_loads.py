"""What the CPU may be given: what host memory has, or can have without having it twice."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import by_hand
from one_precision import SLOT, run

from cache.types import ExpertKey, Tier
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, timed
from offload.decide.split import Split
from offload.decide.stacks import Stacks

K = ExpertKey


class AllItMay(Scheduler):
    """The CPU gets whatever host memory will ever have."""

    name = "all-it-may"

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        may = [load.cpu_ready_s < inf for load in loads]
        sides = [[i for i, on_cpu in enumerate(may) if on_cpu == side] for side in (False, True)]
        return timed(loads, costs, *sides)


def test_what_only_the_accelerator_holds_is_not_read_again_for_the_cpu() -> None:
    costs = SplitCosts(gpu_s=lambda n: 9.0, cpu_s=lambda n: 1.0, copy_s=1.0, read_s=1.0, cpu_start_s=0.0)
    for host, on_cpu in ((0, []), (2, [K(0, 0), K(0, 1)])):
        caches = [by_hand.cache_of(tier, slots, SLOT, 1, 4) for tier, slots in ((Tier.GPU, 2), (Tier.CPU, host))]
        manager = Manager(Stacks.single(caches, SLOT))
        run(manager, by_hand.event(0, [0, 1]))
        manager.split = Split(AllItMay(), costs)
        plan = run(manager, by_hand.event(0, [0, 1]))
        assert sorted(plan.on_cpu) == on_cpu and plan.fetches == []
