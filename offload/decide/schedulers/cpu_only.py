"""Compute what is missing where it lies."""

from __future__ import annotations

from collections.abc import Sequence

from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, register, residents_first, timed


@register
class CpuOnly(Scheduler):
    """The accelerator computes what it holds, the CPU all the rest; nothing crosses the link.

    Source: Fiddler, arXiv 2402.07033, as it decodes. Over prompts Fiddler fetches an expert where that is sooner than
    computing it in place, expert by expert, as if nothing else were going on; `dali` does that with the rest in view.
    """

    name = "cpu-only"

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        order = residents_first(loads)
        held = sum(load.cached for load in loads)
        return timed(loads, costs, order[:held], order[held:])
