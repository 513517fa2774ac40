"""The simulated clock where experts have several precisions: every slice travels by itself, at its own size."""

from __future__ import annotations

from collections.abc import Sequence

from cache.types import ExpertKey, Tier
from offload.costs.model import CostModel
from offload.decide.plan import Fetch, LayerPlan
from offload.simulation.overlap import OverlappingEngine


class MixedEngine(OverlappingEngine):
    """Times the plans of a `MixedManager`.

    `cost` is of experts at the model's own precision, and of all that is no expert; `compute` are the costs of
    computing at each of the manager's precisions; `sizes` are the slices' bytes.
    """

    def __init__(
        self, cost: CostModel, compute: Sequence[CostModel], sizes: Sequence[int], computing: Tier, top_k: int
    ) -> None:
        super().__init__(cost, computing, top_k)
        self._compute_at = compute
        self._sizes = sizes
        self._unit_bytes = sizes[0]

    def _waiting(self, plan: LayerPlan) -> dict[ExpertKey, set[int]]:
        return {key: set(plan.waits_for(key)) for key in plan.event.keys if plan.waits_for(key)}

    def _cost_of(self, key: ExpertKey, plan: LayerPlan) -> CostModel:
        return self._compute_at[plan.precision(key)]

    def _bytes(self, fetch: Fetch) -> int:
        return self._sizes[fetch.slice]
