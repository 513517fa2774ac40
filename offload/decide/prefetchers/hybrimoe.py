"""Whatever shortens the next layers most, by simulation, as long as the link is idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.decide.prefetchers.base import Outlook, PrefetchRule, register
from offload.decide.schedulers.base import Costs, Load, Scheduler
from offload.decide.schedulers.gpu_only import GpuOnly
from offload.decide.schedulers.hybrimoe import HybriMoE as Divided
from predictors.base import Prediction


@dataclass
class _Layer:
    """One layer ahead, as it is expected: its experts with their tokens, and which of them are there."""

    wanted: Sequence[Prediction]
    tokens: list[int]
    cached: list[bool]
    absent: list[int]
    """Indices of what could be fetched."""


@register
class HybriMoE(PrefetchRule):
    """Simulates each of the next three layers with the loads expected there, and fetches the expert whose presence
    shortens its layer most; then again, until nothing gains, or the link is busy until the next layer.

    The K likeliest of a layer are expected, each with as many tokens as its probability says. Gains are not weighed by
    that probability.

    Source: HybriMoE, arXiv 2504.05897. Its public code fetches the next layer's best by the cache's scores instead.
    """

    name = "hybrimoe"
    reach = 3

    def reset(self) -> None:
        self._known: dict[tuple[tuple[int, ...], tuple[bool, ...]], float] = {}
        self._at: tuple[float, ...] = ()

    def choose(self, outlook: Outlook) -> None:
        own = outlook.known.costs
        costs = own or Costs(lambda tokens: outlook.expert_s, lambda tokens: outlook.expert_s, outlook.fetch_s)
        scheduler: Scheduler = GpuOnly() if own is None else Divided()
        at = costs.gpu_s(1), costs.cpu_s(1), costs.copy_s, float(own is None)
        if at != self._at:  # times change with every pass
            self._at = at
            self._known.clear()
        layers = [_layer(outlook, lead) for lead in range(1, outlook.depth + 1)]
        while True:
            gains = [
                (self._gain(layer, index, scheduler, costs), -lead, -index)
                for lead, layer in enumerate(layers)
                for index in layer.absent
            ]
            if not gains or max(gains)[0] <= 0:
                return
            _, lead, index = max(gains)
            layer, index = layers[-lead], -index
            layer.absent.remove(index)
            offer = outlook.offer(layer.wanted[index])
            if offer.begins_s >= outlook.starts_s(1):
                return
            if offer.find_room():
                offer.begin()
                layer.cached[index] = True

    def _gain(self, layer: _Layer, index: int, scheduler: Scheduler, costs: Costs) -> float:
        with_it = [*layer.cached]
        with_it[index] = True
        return self._makespan(layer.tokens, layer.cached, scheduler, costs) - self._makespan(
            layer.tokens, with_it, scheduler, costs
        )

    def _makespan(self, tokens: Sequence[int], cached: Sequence[bool], scheduler: Scheduler, costs: Costs) -> float:
        pairs = sorted(zip(tokens, cached, strict=True))
        asked = tuple(count for count, _ in pairs), tuple(there for _, there in pairs)
        if asked not in self._known:
            self._known[asked] = scheduler.assign([Load(*pair) for pair in pairs], costs).makespan_s
        return self._known[asked]


def _layer(outlook: Outlook, lead: int) -> _Layer:
    wanted = outlook.expected(lead)[: outlook.top_k]
    rows = max(outlook.event.tokens, default=1)
    absent = [index for index, prediction in enumerate(wanted) if outlook.is_absent(prediction)]
    tokens = [max(1, round(prediction.probability * rows)) for prediction in wanted]
    return _Layer(wanted, tokens, [index not in absent for index in range(len(wanted))], absent)
