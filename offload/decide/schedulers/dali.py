"""DALI: first those for which the choice matters most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, register, timed


@dataclass(frozen=True)
class Params:
    """`serial`: decide as if the accelerator computed nothing while a transfer for it is under way."""

    serial: bool = False


@register
class Dali(Scheduler):
    """By descending difference between the CPU's and the accelerator's time, the transfer included in the latter, each
    expert goes where it is done sooner after what went there before it.

    On the accelerator that is after its residents so far, for one that it holds, and after everything so far and its
    own transfer, for one that is fetched. It then computes residents first, and fetches in the order of the decisions.

    Source: DALI, arXiv 2602.03495: its greedy assignment. `serial` is the plain reading of it, sums of times; that
    transfers and computations overlap is our model's.
    """

    name = "dali"
    Params = Params

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        copy_s = [costs.transfer_s(load) for load in loads]
        on_gpu_s = [costs.on_gpu_s(load) for load in loads]
        on_cpu_s = [costs.on_cpu_s(load) for load in loads]
        residents: list[int] = []
        fetched: list[int] = []
        cpu: list[int] = []
        resident_s = fetched_s = copied_s = 0.0  # how long residents and others are computed, and others copied
        chain_s = 0.0  # when the last one fetched is done if no residents are in its way
        cpu_s = costs.cpu_start_s
        for i in sorted(range(len(loads)), key=lambda i: -abs(on_cpu_s[i] - on_gpu_s[i] - copy_s[i])):
            landed_s = max(copied_s, loads[i].ready_s) + copy_s[i]
            chained_s = max(chain_s, landed_s) + on_gpu_s[i]
            cpu_done_s = max(cpu_s, loads[i].cpu_ready_s) + on_cpu_s[i]
            if self.params.serial:
                gpu_done_s = resident_s + fetched_s + copied_s + copy_s[i] + on_gpu_s[i]
            elif loads[i].cached:
                gpu_done_s = resident_s + on_gpu_s[i]
            else:
                gpu_done_s = max(chained_s, resident_s + fetched_s + on_gpu_s[i])
            if gpu_done_s > cpu_done_s:
                cpu.append(i)
                cpu_s = cpu_done_s
            elif loads[i].cached:
                residents.append(i)
                resident_s += on_gpu_s[i]
            else:
                fetched.append(i)
                copied_s = landed_s
                chain_s = chained_s
                fetched_s += on_gpu_s[i]
        return timed(loads, costs, residents + fetched, cpu)
