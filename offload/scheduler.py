"""Who computes what in a layer, and how long that takes: a layer's event under a stated rule. Torch-free.

The same simulation decides (which expert goes where) and answers "what if" questions: what it would save to have one
more expert resident is the makespan without it minus the makespan with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Rule = Literal["gpu-only", "cpu-only", "hybrimoe"]


class Load(NamedTuple):
    """One expert of an event: how many tokens it has, and whether the accelerator holds it."""

    tokens: int
    cached: bool


@dataclass(frozen=True)
class Costs:
    """Seconds: one expert for n tokens on either processor, the CPU's once a layer on top, a copy of one expert."""

    gpu_s: Callable[[int], float]
    cpu_s: Callable[[int], float]
    copy_s: float
    cpu_start_s: float = 0.0


@dataclass(frozen=True)
class Assignment:
    """Indices into the loads: where each is computed, in order; `copied` are those that cross the link first."""

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    copied: tuple[int, ...]
    makespan_s: float


def simulate(loads: Sequence[Load], costs: Costs, rule: Rule) -> Assignment:
    """Assign every expert of an event, and time it.

    `gpu-only` computes what is cached, most tokens first, then what is copied, as it lands; copies go one after the
    other, most tokens first. `cpu-only` leaves the accelerator alone. `hybrimoe` is the greedy rule of HybriMoE (arXiv
    2504.05897, as its code decides while decoding): cached experts by descending tokens, then the others, from both
    ends of that list: the accelerator takes the head if it would be done with it no later than the CPU with the tail.
    Ties keep the order of `loads`.
    """
    order = sorted(range(len(loads)), key=lambda i: (not loads[i].cached, -loads[i].tokens))
    gpu_s = cpu_s = link_s = 0.0
    gpu: list[int] = []
    cpu: list[int] = []
    copied: list[int] = []
    head, tail = 0, len(order) - 1
    while head <= tail:
        first, last = loads[order[head]], loads[order[tail]]
        landed_s = gpu_s if first.cached else max(gpu_s, link_s + costs.copy_s)
        on_gpu_s = landed_s + costs.gpu_s(first.tokens)
        on_cpu_s = cpu_s + costs.cpu_s(last.tokens) + (0.0 if cpu else costs.cpu_start_s)
        if rule == "gpu-only" or (rule == "hybrimoe" and on_gpu_s <= on_cpu_s):
            gpu.append(order[head])
            if not first.cached:
                copied.append(order[head])
                link_s += costs.copy_s
            gpu_s = on_gpu_s
            head += 1
        else:
            cpu.append(order[tail])
            cpu_s = on_cpu_s
            tail -= 1
    return Assignment(tuple(gpu), tuple(cpu), tuple(copied), max(gpu_s, cpu_s))
