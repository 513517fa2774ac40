"""The best there is, found by trying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from cache.errors import PolicyError
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, register, timed


@dataclass(frozen=True)
class Params:
    """`limit`: how many experts it takes on. Each one more doubles the splits."""

    limit: int = 12


@register
class Optimal(Scheduler):
    """No other assignment has a shorter makespan. For tests and comparisons: it may take as long as the layer.

    Where all experts are in host memory, that is; for those on disk it keeps to the same orders.

    For given sets the best order is known: the link and then the accelerator are a flow shop of two machines, residents
    being jobs that the first one has nothing to do with. So only the sets are searched, expert by expert in that order,
    with what cannot beat the best one so far left out: both clocks only go forward, and the remaining work, even where
    each expert is fastest, is for two processors to share.

    Source: Johnson 1954 for the order; branch and bound, Land and Doig 1960, for the sets. Raises PolicyError for a
    layer of more than `limit` experts.
    """

    name = "optimal"
    Params = Params
    live = False

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        if len(loads) > self.params.limit:
            raise PolicyError(
                f'scheduler "optimal" tries all splits of a layer, of {len(loads)} experts too many: it takes on '
                f"{self.params.limit} (limit=...); choose another one, such as dali"
            )
        copy_s = [costs.transfer_s(load) for load in loads]
        on_gpu_s = [costs.on_gpu_s(load) for load in loads]
        on_cpu_s = [costs.on_cpu_s(load) for load in loads]

        def place(i: int) -> tuple[bool, bool, float]:
            """Johnson's: where the transfer is the shorter part by ascending transfer, then by descending rest."""
            long = copy_s[i] > on_gpu_s[i]
            return not loads[i].cached, long, -on_gpu_s[i] if long else copy_s[i]

        order = sorted(range(len(loads)), key=place)
        rest_s = [0.0]  # of the last ones of the order, the least work that they can be
        for i in reversed(order):
            rest_s.append(rest_s[-1] + min(on_gpu_s[i], on_cpu_s[i]))
        rest_s.reverse()
        best_s = inf
        best: list[bool] = []  # whether the CPU has it, in the order
        chosen: list[bool] = []

        def search(gpu_s: float, cpu_s: float, link_s: float) -> None:
            nonlocal best_s, best
            depth = len(chosen)
            if max(gpu_s, cpu_s, (gpu_s + cpu_s + rest_s[depth]) / 2) >= best_s:
                return
            if depth == len(order):
                best_s, best = max(gpu_s, cpu_s), chosen.copy()
                return
            i = order[depth]
            chosen.append(False)
            landed_s = max(link_s, loads[i].ready_s) + copy_s[i]
            search((gpu_s if loads[i].cached else max(gpu_s, landed_s)) + on_gpu_s[i], cpu_s, landed_s)
            chosen[-1] = True
            search(gpu_s, max(cpu_s or costs.cpu_start_s, loads[i].cpu_ready_s) + on_cpu_s[i], link_s)
            chosen.pop()

        search(0.0, 0.0, 0.0)
        sides = list(zip(order, best, strict=True))
        return timed(loads, costs, [i for i, cpu in sides if not cpu], [i for i, cpu in sides if cpu])
