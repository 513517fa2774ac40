"""Fetch whatever is missing."""

from __future__ import annotations

from collections.abc import Sequence

from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, register, residents_first, timed


@register
class GpuOnly(Scheduler):
    """The accelerator computes everything: what it holds, most tokens first, then what is fetched, as it lands; most
    tokens are fetched first.

    Source: the on-demand loading of mixtral-offloading, arXiv 2312.17238, and of most that came after it.
    """

    name = "gpu-only"

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        return timed(loads, costs, residents_first(loads), ())
