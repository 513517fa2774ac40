"""MoNDE: the experts with the most tokens move to the accelerator, the others are computed near their weights."""

from __future__ import annotations

from collections.abc import Sequence

from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, register, residents_first, timed


@register
class Monde(Scheduler):
    """Of the missing experts, the H with the most tokens are fetched, and the CPU computes the others where they lie,
    so that both sides are done at the same time, or as nearly as a whole number allows: at the H where the later one is
    done first, the smallest of equals.

    The accelerator computes what it holds, then arrivals by descending tokens; the CPU begins with the fewest tokens.

    Source: MoNDE, arXiv 2405.18832. Its near-data processor is our CPU.
    """

    name = "monde"

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        order = residents_first(loads)
        held = sum(load.cached for load in loads)
        missing = order[held:]
        near_s = _near(missing, loads, costs)
        link_s, moved_s = 0.0, sum(costs.on_gpu_s(loads[i]) for i in order[:held])
        best, best_s = 0, max(moved_s, near_s[0])
        for h, i in enumerate(missing, 1):
            link_s = max(link_s, loads[i].ready_s) + costs.transfer_s(loads[i])
            moved_s = max(moved_s, link_s) + costs.on_gpu_s(loads[i])
            if moved_s >= best_s:
                break  # it only gets later
            if near_s[h] < best_s:
                best, best_s = h, max(moved_s, near_s[h])
        return timed(loads, costs, order[: held + best], reversed(missing[best:]))


def _near(missing: Sequence[int], loads: Sequence[Load], costs: Costs) -> list[float]:
    """When the CPU is done with all but the first h of `missing`, for each h."""
    done_s = [0.0]
    for i in reversed(missing):
        begins_s = max(done_s[-1] or costs.cpu_start_s, loads[i].cpu_ready_s)
        done_s.append(begins_s + costs.on_cpu_s(loads[i]))
    return done_s[::-1]
