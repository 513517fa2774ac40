"""Which members of an event the CPU computes while the accelerator computes the others: a scheduler's answer, made a
part of the layer's plan. Torch-free, part of the decision loop.

The costs that the scheduler is asked with were measured before the first event and follow what passes took since. What
was measured is told from outside, so that a log of decisions can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf

from cache.errors import PolicyError
from cache.types import ExpertKey, Tier
from offload.costs.model import CostModel
from offload.decide.pace import PassTime
from offload.decide.plan import LayerPlan
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler

_LATEST = 0.2
"""The weight of the latest pass."""


@dataclass(frozen=True)
class SplitCosts:
    """Seconds on this machine: one expert for n tokens on either processor, one over the link, one from disk, and what
    the CPU needs once a layer to get going."""

    gpu_s: Callable[[int], float]
    cpu_s: Callable[[int], float]
    copy_s: float
    read_s: float
    cpu_start_s: float

    @classmethod
    def modelled(cls, model: CostModel) -> SplitCosts:
        """As a machine's profile has it. Raises ProfileError if that has no accelerator."""
        return cls(
            gpu_s=lambda tokens: model.expert_s(Tier.GPU, tokens),
            cpu_s=lambda tokens: model.expert_s(Tier.CPU, tokens),
            copy_s=model.link_s(model.expert_bytes, computing=True),
            read_s=model.read_s(model.record_bytes),
            cpu_start_s=model.cpu_start_s,
        )


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

    def divide(self, plan: LayerPlan, room: int, on_host: Callable[[ExpertKey], bool]) -> None:
        """Take from a plan what the CPU computes. `plan.fetches` has everything that is missing, in order.

        Afterwards `plan.on_cpu` has the CPU's members; those of them that are in host memory are neither `resident` nor
        fetched any more, the others are fetched `to_host`. What is copied from host memory comes first, in the
        scheduler's order. What the accelerator holds can go to the CPU only if that has it `on_host`, too.

        A free place is filled: as long as there is `room` for more experts than are copied, the CPU's heaviest are
        copied instead. That is not the schedule's shortest, but it comes once, and without it a rule that copies
        nothing would never use the accelerator.

        Raises PolicyError for what no scheduler may say.
        """
        tokens = dict(zip(plan.event.experts, plan.event.tokens, strict=True))
        held = [*plan.resident, *plan.awaited]
        free = [*map(on_host, plan.resident), *[False] * len(plan.awaited)]
        loads = [
            Load(tokens[key.expert], True, None, 0.0 if there else inf) for key, there in zip(held, free, strict=True)
        ]
        read_s = 0.0
        for fetch in plan.fetches:
            from_disk = fetch.source is Tier.DISK
            read_s += self._read_s if from_disk else 0.0
            loads.append(Load(tokens[fetch.key.expert], False, None, read_s if from_disk else 0.0))
        found = self.scheduler.assign(loads, self.costs)
        self._check(found, loads)
        copied = [i for i in found.gpu if not loads[i].cached]
        keys = held + [fetch.key for fetch in plan.fetches]
        heaviest = sorted((i for i in found.cpu if i >= len(held)), key=lambda i: -loads[i].tokens)
        filled = heaviest[: max(room - len(copied), 0)]
        plan.on_cpu = [keys[i] for i in found.cpu if i not in filled]
        chosen = set(plan.on_cpu)
        plan.resident = [key for key in plan.resident if key not in chosen]
        rank = {keys[i]: number for number, i in enumerate((*copied, *filled))}
        copies = [fetch for fetch in plan.fetches if fetch.source is not Tier.DISK and fetch.key not in chosen]
        reads = [fetch for fetch in plan.fetches if fetch.source is Tier.DISK]
        for fetch in reads:
            fetch.to_host = fetch.key in chosen
        plan.fetches = sorted(copies, key=lambda fetch: rank[fetch.key]) + reads
        for i, load in enumerate(loads):
            if keys[i] in chosen:
                self._cpu_expected_s += self.costs.cpu_s(load.tokens)
            else:
                self._gpu_expected_s += self.costs.gpu_s(load.tokens)

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

    def _check(self, found: Assignment, loads: Sequence[Load]) -> None:
        if sorted((*found.gpu, *found.cpu)) != list(range(len(loads))):
            raise PolicyError(
                f"scheduler {type(self.scheduler).__name__} gave {list(found.gpu)} to the accelerator and "
                f"{list(found.cpu)} to the CPU: each of {len(loads)} experts goes to one of them"
            )
        if any(loads[i].ready_s == inf for i in found.cpu):
            raise PolicyError(
                f"scheduler {type(self.scheduler).__name__} gave the CPU an expert that host memory will not have: "
                "its ready_s is infinite"
            )

    def _now(self) -> Costs:
        gpu_factor, cpu_factor, measured = self._gpu_factor, self._cpu_factor, self.measured
        return Costs(
            gpu_s=cache(lambda tokens: gpu_factor * measured.gpu_s(tokens)),
            cpu_s=cache(lambda tokens: cpu_factor * measured.cpu_s(tokens)),
            copy_s=self._copy_s,
            cpu_start_s=measured.cpu_start_s,
        )
