"""The simulated clock where experts have several precisions: every slice travels by itself, at its own size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cache.cost import CostModel
from cache.types import ExpertKey, Tier
from offload.clock_overlap import OverlappingEngine
from offload.layer_plan import Fetch, LayerPlan


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

    def run(self, plan: LayerPlan, cancelled: Callable[[Fetch], None]) -> tuple[float, float, list[Fetch]]:
        """As `OverlappingEngine.run`. A member is computed when the last slice that it waits for has landed."""
        start_s, stalled_s = self._now_s, 0.0
        tokens = dict(zip(plan.event.experts, plan.event.tokens, strict=True))
        self._residents = bool(plan.resident)
        waiting = {key: set(plan.waits_for(key)) for key in plan.event.keys if plan.waits_for(key)}
        for key, missing in waiting.items():
            for slice_ in missing:
                if (key, slice_) in self._jobs:
                    self._jobs[key, slice_].urgent = True
        self._submit(plan.fetches, urgent=True)
        for fetch in plan.cancelled:
            if self._take_back(fetch):
                cancelled(fetch)
        self._submit(plan.prefetches, urgent=False)
        for key in plan.resident:
            self._compute_one(key, tokens, plan)
        self._submit(plan.late_fetches, urgent=True)
        received: list[Fetch] = []
        while waiting:
            at_s, fetch = self._next_landing()
            received.append(fetch)
            if fetch.slice not in waiting.get(fetch.key, ()):
                continue
            waiting[fetch.key].discard(fetch.slice)
            if waiting[fetch.key]:
                continue
            del waiting[fetch.key]
            stalled_s += self._wait_until(at_s)
            self._compute_one(fetch.key, tokens, plan)
        self._stall_s += stalled_s
        return self._now_s - start_s, stalled_s, received

    def _next_landing(self) -> tuple[float, Fetch]:
        while not self._landed:
            self._work_once()
        self._landed.sort(key=lambda item: item[0])
        return self._landed.pop(0)

    def _compute_one(self, key: ExpertKey, tokens: dict[int, int], plan: LayerPlan) -> None:
        self._compute(tokens[key.expert], self._compute_at[plan.precision(key)])

    def _bytes(self, fetch: Fetch) -> int:
        return self._sizes[fetch.slice]
