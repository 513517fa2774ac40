"""Who computes each member of an event, accelerator or CPU, and at which precision: a scheduler's answer, made a part
of the layer's plan. Torch-free, part of the decision loop.

The costs that the scheduler is asked with were measured before the first event and follow what passes took since. What
was measured is told from outside, so that a log of decisions can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import inf

from cache.errors import PolicyError
from cache.residency import State
from cache.types import ExpertKey, Tier
from offload.decide.fetching import urgency
from offload.decide.loads import Loads, Member, SplitCosts
from offload.decide.pace import PassTime
from offload.decide.plan import LayerPlan
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler
from offload.decide.stacks import Stacks

_LATEST = 0.2
"""The weight of the latest pass."""


class Split:
    """Divides events between the processors as `scheduler` says."""

    def __init__(self, scheduler: Scheduler, costs: SplitCosts) -> None:
        self.scheduler = scheduler
        self.measured = costs
        """Before the first event."""
        self._gpu_factor = self._cpu_factor = 1.0  # how many times longer things take in practice
        self._copy_s, self._read_s = costs.copy_s, costs.read_s
        self._gpu_expected_s = self._cpu_expected_s = 0.0  # in this pass so far
        self.costs = self._now()

    def divide(self, plan: LayerPlan, stacks: Stacks) -> list[ExpertKey]:
        """Give the CPU its members, and settle the precision of every member. Gives the order in which to fetch.

        Afterwards `plan.on_cpu` has the CPU's members, `waiting` what each member lacks where it is computed, and
        `precisions` have less loss than the fallback allowed where that costs no time. What is copied from host memory
        comes first, in the scheduler's order. What the accelerator holds can go to the CPU only if host memory holds
        it, too.

        A free place is filled: as long as there is room for more experts than are copied, the CPU's heaviest are
        copied instead. That is not the schedule's shortest, but it comes once, and without it a rule that copies
        nothing would never use the accelerator.

        Raises PolicyError for what no scheduler may say.
        """
        order = urgency(plan)
        members = Loads(plan, stacks, self.costs, self._read_s, self.measured).members(order)
        loads = [member.load for member in members]
        found = self.scheduler.serve(loads, self.costs)
        self._check(found, loads)
        now = [load.options[found.served[i]] if i in found.served else load for i, load in enumerate(loads)]

        copied = [i for i in found.gpu if not now[i].cached]
        heaviest = sorted(
            (i for i in found.cpu if not loads[i].cached and i not in found.served), key=lambda i: -loads[i].tokens
        )
        filled = heaviest[: max(_room(plan, stacks) - len(copied), 0)]
        on_cpu = [i for i in found.cpu if i not in filled]
        for i in (*found.gpu, *on_cpu):
            self._settle(plan, stacks, members[i], found.served.get(i), cpu=i in on_cpu)
            self._expect(now[i], cpu=i in on_cpu)
        self._gpu_expected_s += sum(self.costs.on_gpu_s(loads[i]) for i in filled)
        plan.on_cpu = [members[i].key for i in on_cpu]
        unavailable = {*plan.on_cpu, *plan.waiting, *plan.skipped}
        plan.resident = [key for key in plan.keys if key not in unavailable]
        first = [members[i].key for i in (*copied, *filled)]
        first = [key for key in first if not _from_disk(plan, stacks, key)]
        return [*first, *(key for key in order if key not in first)]

    def passed(self, time: PassTime) -> None:
        """A forward pass is over, and this is where its time went."""
        if time.expert_s and self._gpu_expected_s:
            self._gpu_factor *= 1 + _LATEST * (time.expert_s / self._gpu_expected_s - 1)
        if time.host_s and self._cpu_expected_s:
            self._cpu_factor *= 1 + _LATEST * (time.host_s / self._cpu_expected_s - 1)
        if time.copied:
            self._copy_s += _LATEST * (time.copied_s / time.copied - self._copy_s)
        if time.read:
            self._read_s += _LATEST * (time.read_s / time.read - self._read_s)
        self._gpu_expected_s = self._cpu_expected_s = 0.0
        self.costs = self._now()

    def reset(self) -> None:
        """Forget the events seen, as a cold start does; what was measured stays."""
        self.scheduler.reset()
        self._gpu_expected_s = self._cpu_expected_s = 0.0

    def _settle(self, plan: LayerPlan, stacks: Stacks, member: Member, option: int | None, *, cpu: bool) -> None:
        """Note where a member is computed, at which precision, and what it still lacks there."""
        key = member.key
        if option is not None:
            precision = member.load.options[option].precision
        elif cpu:
            precision = member.on_cpu_at
        else:
            return  # as the fallback said
        plan.replaced.pop(key, None)
        if key in plan.skipped:
            plan.skipped.remove(key)
        plan.precisions.pop(key, None)
        if precision:
            plan.precisions[key] = precision
        if precision == plan.targets.get(key):
            del plan.targets[key]
            if key in plan.later:
                plan.later.remove(key)
        lacking = stacks.lacking_on_host(key, precision) if cpu else stacks.lacking(key, precision)
        plan.waiting.pop(key, None)
        if key in plan.awaited:
            plan.awaited.remove(key)
        if lacking:
            plan.waiting[key] = lacking
            if not cpu and any(stacks.by_slice[s][0].state(key) is State.PENDING for s in lacking):
                plan.awaited.append(key)

    def _expect(self, load: Load, *, cpu: bool) -> None:
        if cpu:
            self._cpu_expected_s += self.costs.on_cpu_s(load)
        else:
            self._gpu_expected_s += self.costs.on_gpu_s(load)

    def _check(self, found: Assignment, loads: Sequence[Load]) -> None:
        expected = [i for i, load in enumerate(loads) if not load.left_out or i in found.served]
        if sorted((*found.gpu, *found.cpu)) != expected:
            raise PolicyError(
                f"scheduler {type(self.scheduler).__name__} gave {list(found.gpu)} to the accelerator and "
                f"{list(found.cpu)} to the CPU: each of {len(expected)} experts goes to one of them"
            )
        if any(not 0 <= number < len(loads[i].options) for i, number in found.served.items()):
            raise PolicyError(
                f"scheduler {type(self.scheduler).__name__} served {dict(found.served)}: loads have no such options"
            )
        now = (loads[i].options[found.served[i]] if i in found.served else loads[i] for i in found.cpu)
        if any(load.cpu_ready_s == inf for load in now):
            raise PolicyError(
                f"scheduler {type(self.scheduler).__name__} gave the CPU an expert that host memory will not have: "
                "its cpu_ready_s is infinite"
            )

    def _now(self) -> Costs:
        gpu_factor, cpu_factor, measured = self._gpu_factor, self._cpu_factor, self.measured
        return Costs(
            gpu_s=cache(lambda tokens: gpu_factor * measured.gpu_s(tokens)),
            cpu_s=cache(lambda tokens: cpu_factor * measured.cpu_s(tokens)),
            copy_s=self._copy_s,
            cpu_start_s=measured.cpu_start_s,
        )


def _room(plan: LayerPlan, stacks: Stacks) -> int:
    """How many more experts the accelerator has free places for."""
    layer = plan.event.layer
    return min(stacks.by_slice[s][0].free_bytes(layer) // stacks.sizes[s] for s in stacks.precisions[0])


def _from_disk(plan: LayerPlan, stacks: Stacks, key: ExpertKey) -> bool:
    return any(stacks.source(key, slice_) is Tier.DISK for slice_ in plan.waiting.get(key, ()))
