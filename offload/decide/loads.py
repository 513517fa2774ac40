"""An event's members as a scheduler is asked about them: what serving each takes on either processor. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from cache.residency import State
from cache.types import ExpertKey, Tier
from offload.costs.model import CostModel
from offload.decide.fallbacks.base import SKIP
from offload.decide.plan import LayerPlan
from offload.decide.schedulers.base import Costs, Load
from offload.decide.stacks import Stacks


@dataclass(frozen=True)
class SplitCosts:
    """Seconds on this machine: one expert for n tokens on either processor, one over the link, one from disk, and what
    the CPU needs once a layer to get going.

    They are of the first slice and the best precision; `gpu_factors` and `cpu_factors` say how many times as long
    computing takes at each precision, where there are several.
    """

    gpu_s: Callable[[int], float]
    cpu_s: Callable[[int], float]
    copy_s: float
    read_s: float
    cpu_start_s: float
    gpu_factors: Sequence[float] = ()
    cpu_factors: Sequence[float] = ()

    @classmethod
    def modelled(cls, model: CostModel, compute: Sequence[CostModel] = ()) -> SplitCosts:
        """As a machine's profile has it; `compute` are the costs at each precision. Raises ProfileError if the machine
        has no accelerator."""

        def factors(tier: Tier) -> list[float]:
            own_s = model.expert_s(tier, 1)
            return [each.expert_s(tier, 1) / own_s if own_s else 1.0 for each in compute]

        return cls(
            gpu_s=lambda tokens: model.expert_s(Tier.GPU, tokens),
            cpu_s=lambda tokens: model.expert_s(Tier.CPU, tokens),
            copy_s=model.link_s(model.expert_bytes, computing=True),
            read_s=model.read_s(model.record_bytes),
            cpu_start_s=model.cpu_start_s,
            gpu_factors=factors(Tier.GPU),
            cpu_factors=factors(Tier.CPU),
        )


class Member(NamedTuple):
    """A member of an event, the load that it is to a scheduler, and at which precision the CPU would compute it."""

    key: ExpertKey
    load: Load
    on_cpu_at: int


class Loads:
    """Makes the loads of one event. `costs` are those of now, `read_s` is one first slice from disk."""

    def __init__(self, plan: LayerPlan, stacks: Stacks, costs: Costs, read_s: float, measured: SplitCosts) -> None:
        event = plan.event
        self._plan, self._stacks, self._costs, self._measured = plan, stacks, costs, measured
        self._tokens = dict(zip(event.experts, event.tokens, strict=True))
        total = sum(event.weights) or 1.0
        self._shares = {key: weight / total for key, weight in zip(event.keys, event.weights, strict=True)}
        self._read_s = read_s
        self._queue_s = 0.0  # how long the disk is busy with what comes before

    def members(self, order: Sequence[ExpertKey]) -> list[Member]:
        """Those that the accelerator holds or is about to, then those to be fetched, in this `order`, then those that
        are left out."""
        plan = self._plan
        missing = [key for key in order if any(self._misses(key, slice_) for slice_ in plan.waiting.get(key, ()))]
        awaited = [key for key in plan.awaited if key not in missing]
        found = [self._replaced(key) if key in plan.replaced else self._member(key) for key in plan.resident]
        found += [self._member(key) for key in awaited]
        for key in missing:
            found.append(self._member(key))
            self._queue_s += self._reads_s(key, plan.precision(key))
        return [*found, *(self._left_out(key) for key in plan.skipped)]

    def _member(self, key: ExpertKey) -> Member:
        """Computed with its own weights, at the precision that the plan says, or on the CPU at a better one."""
        precision = self._plan.precision(key)
        target = self._plan.targets.get(key, precision)
        load = self._load(key, precision, target)
        options = tuple(self._load(key, better, target) for better in range(target, precision))
        if not options:
            return Member(key, load, precision)
        at, way = min(enumerate((*options, load), target), key=lambda pair: (pair[1].cpu_ready_s, pair[0]))
        load = load._replace(host_s=way.host_s, cpu_s=way.cpu_s, host_loss=way.loss, options=options)
        return Member(key, load, at)

    def _replaced(self, key: ExpertKey) -> Member:
        """Another expert is computed in its place, which the accelerator holds."""
        precision = self._plan.precision(key)
        options = (self._load(key, precision, precision),)
        load = Load(self._tokens[key.expert], True, host_s=inf, loss=self._shares[key], options=options)
        return Member(key, load._replace(precision=precision), precision)

    def _left_out(self, key: ExpertKey) -> Member:
        target = self._plan.targets[key]
        precisions = range(target, len(self._stacks.precisions))
        options = tuple(self._load(key, precision, target) for precision in precisions)
        load = Load(self._tokens[key.expert], True, host_s=inf, precision=SKIP, loss=self._shares[key])
        return Member(key, load._replace(left_out=True, options=options), SKIP)

    def _load(self, key: ExpertKey, precision: int, target: int) -> Load:
        """An expert with its own weights at a precision, behind what the disk has to read before."""
        stacks, costs, tokens = self._stacks, self._costs, self._tokens[key.expert]
        slices = [slice_ for slice_ in stacks.precisions[precision] if self._misses(key, slice_)]
        crossing = sum(stacks.weight(slice_) for slice_ in slices)
        reads_s = self._reads_s(key, precision)
        gpu, cpu = (_factor(each, precision) for each in (self._measured.gpu_factors, self._measured.cpu_factors))
        lost = 1 - stacks.nbytes(precision) / stacks.nbytes(target) if precision != target else 0.0
        return Load(
            tokens,
            cached=not slices,
            copy_s=None if crossing in (0, 1) else crossing * costs.copy_s,
            ready_s=self._queue_s + reads_s if reads_s else 0.0,
            host_s=self._host_s(key, precision, held=not slices),
            gpu_s=None if gpu == 1 else gpu * costs.gpu_s(tokens),
            cpu_s=None if cpu == 1 else cpu * costs.cpu_s(tokens),
            precision=precision,
            loss=self._shares[key] * max(lost, 0.0),
        )

    def _host_s(self, key: ExpertKey, precision: int, *, held: bool) -> float:
        """When host memory has an expert; never if something of it is on its way there, or to the accelerator, which
        else could have it twice."""
        stacks = self._stacks
        lacking = stacks.lacking_on_host(key, precision)
        if held and (lacking or stacks.state(key, precision) is State.PENDING):
            return inf
        if any(stacks.by_slice[slice_][1].state(key) is State.PENDING for slice_ in lacking):
            return inf
        return self._queue_s + self._read_s * sum(map(stacks.weight, lacking)) if lacking else 0.0

    def _reads_s(self, key: ExpertKey, precision: int) -> float:
        """What the disk has to read before the accelerator can have it."""
        stacks = self._stacks
        slices = stacks.precisions[precision]
        return self._read_s * sum(
            stacks.weight(s) for s in slices if self._misses(key, s) and stacks.source(key, s) is Tier.DISK
        )

    def _misses(self, key: ExpertKey, slice_: int) -> bool:
        return self._stacks.by_slice[slice_][0].state(key) is State.MISS


def _factor(factors: Sequence[float], precision: int) -> float:
    return factors[precision] if factors else 1.0
