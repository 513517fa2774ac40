"""AdapMoE: by how much weight comes before, and how sensitive the layer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.types import RoutingEvent
from offload.decide.fallbacks.base import LOW_SHARE, SKIP, Candidate, Choice, Fallback, register


@dataclass(frozen=True)
class Params:
    """`threshold` is in units of the mean layer's sensitivity; `skip` leaves out what falls below it, and needs no
    lower precision."""

    threshold: float = 0.05
    skip: bool = False
    low_share: float = LOW_SHARE


@register
class AdapMoE(Fallback):
    """A missing expert whose (1 - a)^2 * w falls to the threshold is degraded: a is the share of router weight before
    it, w its layer's sensitivity. The strongest expert of an event never is.

    Source: AdapMoE, arXiv 2408.10284, which skips the second of two experts; here every expert but the first is judged.
    Without a calibration all layers are held equally sensitive.
    """

    name = "adapmoe"
    Params = Params

    def __init__(self, num_layers: int, num_experts: int, precisions: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, precisions, params)
        self.needs_lower = not self.params.skip

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        weights = self.sensitivity.layers
        sensitivity = weights[event.layer] if weights else 1.0
        low = SKIP if self.params.skip else self.precisions - 1
        return [
            Choice(low if c.before > 0 and (1 - c.before) ** 2 * sensitivity <= self.params.threshold else c.target)
            for c in candidates
        ]
