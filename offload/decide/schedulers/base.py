"""What a scheduler is: who computes what in a layer, accelerator or CPU, in which order. Torch-free.

All schedulers share one model of a layer. The accelerator, the CPU and the link between them work side by side, each on
one thing at a time, and what has begun is not interrupted. What the accelerator holds can start there at once; what it
lacks can be computed there once it has crossed the link. The CPU can take any expert that is in host memory; what is on
disk gets there at a stated time, and neither the CPU nor the link can begin with it before. A computation's time
depends on the number of tokens, a transfer's on the expert alone; the CPU may need a moment once a layer to get going.
The layer is done when both processors are: that is its makespan.

The same simulation decides (which expert goes where) and answers "what if" questions: what it would save to have one
more expert resident is the makespan without it minus the makespan with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, ClassVar, NamedTuple

from cache.registry import Part, Registry
from cache.types import Tier
from offload.costs.model import CostModel


class Load(NamedTuple):
    """One expert of an event: how many tokens it has, whether the accelerator holds it, and what serving it takes.

    `copy_s`, `gpu_s` and `cpu_s` are its own transfer and computations, where it is not of the size or at the precision
    that the layer's costs are for. `ready_s` is when its bytes will be in host memory, 0.0 for what is there; infinite
    for what never will, which the CPU cannot take. `host_s` is the same for the CPU alone, which may compute it at
    another precision than the accelerator would.

    `loss` is what serving it so loses, `host_loss` what it loses on the CPU, where that differs: its share of the
    event's router weight times the share of its bits that go unused. `left_out`: it is not computed at all. `options`
    are the other ways to serve it that the fallback allows, each a load of its own with a smaller loss.
    """

    tokens: int
    cached: bool
    copy_s: float | None = None
    ready_s: float = 0.0
    host_s: float | None = None
    gpu_s: float | None = None
    cpu_s: float | None = None
    precision: int = 0
    loss: float = 0.0
    host_loss: float | None = None
    left_out: bool = False
    options: tuple[Load, ...] = ()

    @property
    def cpu_ready_s(self) -> float:
        """When the CPU can begin with it."""
        return self.ready_s if self.host_s is None else self.host_s


@dataclass(frozen=True)
class Costs:
    """Seconds: one expert for n tokens on either processor, the CPU's once a layer on top, a copy of one expert."""

    gpu_s: Callable[[int], float]
    cpu_s: Callable[[int], float]
    copy_s: float
    cpu_start_s: float = 0.0

    @classmethod
    def measured(cls, model: CostModel, cpu_start_s: float = 0.0) -> Costs:
        """From a machine's profile. Raises ProfileError if it has no accelerator."""
        return cls(
            gpu_s=lambda tokens: model.expert_s(Tier.GPU, tokens),
            cpu_s=lambda tokens: model.expert_s(Tier.CPU, tokens),
            copy_s=model.link_s(model.expert_bytes),
            cpu_start_s=cpu_start_s,
        )

    def transfer_s(self, load: Load) -> float:
        """How long the link is busy before the accelerator can compute it."""
        if load.cached:
            return 0.0
        return self.copy_s if load.copy_s is None else load.copy_s

    def on_gpu_s(self, load: Load) -> float:
        """How long the accelerator computes it."""
        return self.gpu_s(load.tokens) if load.gpu_s is None else load.gpu_s

    def on_cpu_s(self, load: Load) -> float:
        """How long the CPU computes it."""
        return self.cpu_s(load.tokens) if load.cpu_s is None else load.cpu_s


@dataclass(frozen=True)
class Assignment:
    """Indices into the loads: where each is computed, in order; `copied` are those that cross the link first.

    The accelerator computes in just this order, waiting where it has to; the link carries in the order in which the
    accelerator computes, which for given sets is never worse than another. `served` has the loads that are served by
    one of their options, and by which.
    """

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    copied: tuple[int, ...]
    makespan_s: float
    served: Mapping[int, int] = field(default_factory=dict)


def timed(loads: Sequence[Load], costs: Costs, gpu: Iterable[int], cpu: Iterable[int]) -> Assignment:
    """The assignment of these orders on either processor, with its makespan."""
    gpu, cpu = tuple(gpu), tuple(cpu)
    gpu_s = link_s = 0.0
    copied = []
    for i in gpu:
        if not loads[i].cached:
            copied.append(i)
            link_s = max(link_s, loads[i].ready_s) + costs.transfer_s(loads[i])
            gpu_s = max(gpu_s, link_s)
        gpu_s += costs.on_gpu_s(loads[i])
    cpu_s = costs.cpu_start_s if cpu else 0.0
    for i in cpu:
        cpu_s = max(cpu_s, loads[i].cpu_ready_s) + costs.on_cpu_s(loads[i])
    return Assignment(gpu, cpu, tuple(copied), max(gpu_s, cpu_s))


def give_back(loads: Sequence[Load], costs: Costs, found: Assignment) -> Assignment:
    """`found`, with every loss undone that saves no time: whoever loses most first, by the least lossy option that
    makes the layer no longer, on the CPU if it can be, else on the accelerator."""
    now, gpu, cpu, served = list(loads), list(found.gpu), list(found.cpu), dict(found.served)
    for i in sorted(range(len(loads)), key=lambda i: -loads[i].loss):
        load = loads[i]
        loses = load.loss if i not in cpu or load.host_loss is None else load.host_loss
        for number, option in sorted(enumerate(load.options), key=lambda pair: pair[1].loss):
            if option.loss >= loses:
                break
            now[i] = option
            places = (
                ([each for each in gpu if each != i], cpu if i in cpu else [*cpu, i]),
                (gpu if i in gpu else [*gpu, i], [each for each in cpu if each != i]),
            )
            shorter = next((p for p in places if timed(now, costs, *p).makespan_s <= found.makespan_s), None)
            if shorter is not None:
                gpu, cpu = shorter
                served[i] = number
                break
            now[i] = load
    return replace(timed(now, costs, gpu, cpu), served=served)


def _possible(loads: Sequence[Load], costs: Costs, found: Assignment) -> Assignment:
    """`found`, with what the CPU can never begin with on the accelerator, after everything else."""
    never = [i for i in found.cpu if loads[i].cpu_ready_s == inf]
    if not never:
        return found
    return timed(loads, costs, [*found.gpu, *never], [i for i in found.cpu if i not in never])


def residents_first(loads: Sequence[Load]) -> list[int]:
    """Indices: what the accelerator holds, most tokens first, then what it lacks, most tokens first."""
    return sorted(range(len(loads)), key=lambda i: (not loads[i].cached, -loads[i].tokens))


class Scheduler(Part, ABC):
    """Assigns the experts of one layer's event.

    Ties go by the order of `loads`: the same loads and costs, after the same ones before, give the same assignment.
    """

    live: ClassVar[bool] = True
    """Whether it is quick enough to divide a running model's layers."""

    def __init__(self, params: Any = None) -> None:  # no shape: it sees one layer at a time
        self.params = self.Params() if params is None else params
        self.reset()

    def __repr__(self) -> str:
        return f"{self.name}({self.params})"

    def reset(self) -> None:
        """Forget the events seen so far. Subclasses that remember any create their state here."""

    @abstractmethod
    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        """Every expert of an event to one of the processors, as `timed` tells it."""

    def serve(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        """Every expert to a processor and a precision, by cost and by what that loses.

        Here `assign` has those that are computed at all, as the fallback chose for them. What it gives the CPU and host
        memory will not have goes to the accelerator, and then every loss that saves no time is given back. A scheduler
        that weighs precisions itself overrides this: `served` of its answer says which option serves a load; one that
        is left out goes to no processor, and none whose `cpu_ready_s` is infinite to the CPU.
        """
        kept = [i for i, load in enumerate(loads) if not load.left_out]
        computed = [loads[i] for i in kept]
        found = _possible(computed, costs, self.assign(computed, costs))
        if len(kept) < len(loads):
            gpu, cpu, copied = ([kept[i] for i in indices] for indices in (found.gpu, found.cpu, found.copied))
            found = replace(found, gpu=tuple(gpu), cpu=tuple(cpu), copied=tuple(copied))
        return give_back(loads, costs, found) if any(load.options for load in loads) else found


_registry: Registry[Scheduler] = Registry("scheduler", Scheduler, ["offload.decide.schedulers"])  # type: ignore[type-abstract]
register = _registry.register
scheduler_names = _registry.names
find_scheduler = _registry.find


def divides(spec: str) -> bool:
    """Whether the scheduler that `spec` names may give the CPU anything."""
    return spec != "gpu-only"


def make_scheduler(spec: str) -> Scheduler:
    """The scheduler that `spec` names, such as "dali" or "ratio(least=3)". Raises PolicyError."""
    return _registry.make(spec)
