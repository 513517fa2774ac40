"""What one expert more would save, were it where a layer needs it when it begins: the makespan without it minus the
makespan with it. Torch-free, part of the decision loop.

Source: HybriMoE, arXiv 2504.05897, which weighs prefetches so.
"""

from __future__ import annotations

from offload.decide.schedulers.base import Costs, Load
from offload.decide.schedulers.gpu_only import GpuOnly
from offload.decide.schedulers.hybrimoe import HybriMoE

_REMEMBERED = 1000
"""Layers whose makespans are remembered; times change with every pass."""


class Makespans:
    """How long layers take of which so many experts are missing. `cpu_s` is one expert on the CPU, where that computes
    beside the accelerator: a fetch then saves no more than it takes the CPU to do without."""

    def __init__(self) -> None:
        self.cpu_s: float | None = None
        self._on_demand, self._divided = GpuOnly(), HybriMoE()
        self._known: dict[tuple[int, int, float, float, float | None], float] = {}

    def of(self, experts: int, missing: int, expert_s: float, fetch_s: float) -> float:
        """An event of so many experts, of which so many are not where they compute when it begins."""
        cpu_s = self.cpu_s
        asked = experts, missing, expert_s, fetch_s, cpu_s
        if asked not in self._known:
            if len(self._known) > _REMEMBERED:
                self._known.clear()
            rule = self._on_demand if cpu_s is None else self._divided
            costs = Costs(gpu_s=lambda tokens: expert_s, cpu_s=lambda tokens: cpu_s or expert_s, copy_s=fetch_s)
            loads = [Load(1, index >= missing) for index in range(experts)]
            self._known[asked] = rule.assign(loads, costs).makespan_s
        return self._known[asked]

    def saved_s(self, experts: int, missing: int, expert_s: float, fetch_s: float) -> float:
        """What it saves if one of the missing is there."""
        with_it = self.of(experts, missing - 1, expert_s, fetch_s)
        return self.of(experts, missing, expert_s, fetch_s) - with_it
