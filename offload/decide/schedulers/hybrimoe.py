"""HybriMoE: the accelerator from the heavy end, the CPU from the light one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, register, residents_first, timed


@dataclass(frozen=True)
class Params:
    """`paper`: the rule as the paper tells it, instead of the one that its public code decodes with."""

    paper: bool = False


@register
class HybriMoE(Scheduler):
    """Three clocks, for accelerator, CPU and link, tell who takes the next expert.

    The code's rule: of the cached experts by descending tokens, then the others by descending tokens, the accelerator
    takes the head if it would be done with it no later than the CPU with the tail; else the CPU takes the tail.

    The paper's rule: whoever is free first takes the next one of its own list. The accelerator's are the cached
    experts, most tokens first, joined by those that land; the CPU's are the uncached ones, fewest tokens first; the
    link's are the same, most tokens first. Who is free at the same time goes in this order. That a processor will take
    long is no reason not to take.

    Source: HybriMoE, arXiv 2504.05897, and its public code, commit 508a85b9.
    """

    name = "hybrimoe"
    Params = Params

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        gpu, cpu = _by_lists(loads, costs) if self.params.paper else _from_both_ends(loads, costs)
        return timed(loads, costs, gpu, cpu)


def _from_both_ends(loads: Sequence[Load], costs: Costs) -> tuple[list[int], list[int]]:
    order = residents_first(loads)
    gpu_s = link_s = 0.0
    cpu_s = costs.cpu_start_s
    gpu: list[int] = []
    cpu: list[int] = []
    head, tail = 0, len(order) - 1
    while head <= tail:
        first, last = loads[order[head]], loads[order[tail]]
        landed_s = max(link_s, first.ready_s) + costs.transfer_s(first)
        starts_s = gpu_s if first.cached else max(gpu_s, landed_s)
        gpu_done_s = starts_s + costs.on_gpu_s(first)
        cpu_done_s = max(cpu_s, last.cpu_ready_s) + costs.on_cpu_s(last)
        if gpu_done_s <= cpu_done_s:
            gpu.append(order[head])
            gpu_s, link_s = gpu_done_s, landed_s
            head += 1
        else:
            cpu.append(order[tail])
            cpu_s = cpu_done_s
            tail -= 1
    return gpu, cpu


def _by_lists(loads: Sequence[Load], costs: Costs) -> tuple[list[int], list[int]]:
    order = residents_first(loads)
    held = sum(load.cached for load in loads)
    ready, missing = order[:held], order[held:]  # both by descending tokens
    landing: list[tuple[float, int]] = []
    gpu_s = link_s = 0.0
    cpu_s = costs.cpu_start_s
    gpu: list[int] = []
    cpu: list[int] = []
    while ready or landing or missing:
        gpu_next_s = gpu_s if ready else max(gpu_s, landing[0][0]) if landing else inf
        if gpu_next_s <= (min(cpu_s, link_s) if missing else inf):
            while landing and landing[0][0] <= gpu_next_s:
                ready.append(landing.pop(0)[1])
            ready.sort(key=lambda i: -loads[i].tokens)
            gpu.append(ready.pop(0))
            gpu_s = gpu_next_s + costs.on_gpu_s(loads[gpu[-1]])
        elif cpu_s <= link_s:
            cpu.append(missing.pop())
            cpu_s = max(cpu_s, loads[cpu[-1]].cpu_ready_s) + costs.on_cpu_s(loads[cpu[-1]])
        else:
            sent = missing.pop(0)
            link_s = max(link_s, loads[sent].ready_s) + costs.transfer_s(loads[sent])
            landing.append((link_s, sent))
    return gpu, cpu
