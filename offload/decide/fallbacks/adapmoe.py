"""AdapMoE: by how much weight comes before, and how sensitive the layer is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.traces.by_token import Mask, Routed, weight_before
from cache.types import RoutingEvent
from offload.decide.fallbacks.base import LOW_SHARE, Candidate, Choice, Fallback, Sensitivity, register


@dataclass(frozen=True)
class Params:
    """`threshold` is in units of the mean layer's sensitivity. `skip` drops what falls to it, resident or not, and
    needs no lower precision; with `renormalise` a token's other experts take over the weight. Without `skip`, missing
    experts have the lowest precision then."""

    threshold: float = 0.05
    skip: bool = False
    renormalise: bool = True
    low_share: float = LOW_SHARE


@register
class AdapMoE(Fallback):
    """A token does without the experts for which (1 - a)^2 * w falls to the threshold: a is the share of its router
    weight before an expert, so that 1 - a is what the token loses with it and all weaker ones; w is the layer's
    sensitivity, measured with the operation that runs. A token's strongest expert always remains.

    Source: AdapMoE, arXiv 2408.10284. It drops the second of two experts; here every expert but the first is judged.
    Its published code, commit e6943620, renormalises. Without a calibration all layers are held equally sensitive.
    """

    name = "adapmoe"
    by_token = True
    Params = Params

    def __init__(self, num_layers: int, num_experts: int, precisions: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, precisions, params)
        self.needs_lower = not self.params.skip
        self.gates = self.params.skip
        self.renormalises = self.params.skip and self.params.renormalise
        self.by_layer: Sequence[float] = ()
        """Sensitivities to what this does; empty where they are not known."""

    def learn(self, sensitivity: Sensitivity) -> None:
        """Warns where a calibration does not say what dropping without renormalising costs."""
        super().learn(sensitivity)
        self.by_layer = sensitivity.unscaled if self.gates and not self.renormalises else sensitivity.layers
        if sensitivity.layers and not self.by_layer:
            warnings.warn(
                "adapmoe(renormalise=False) holds all layers equally sensitive: this calibration does not say what "
                "such dropping costs, run `offload calibrate` again",
                stacklevel=2,
            )

    def keep(self, routed: Routed) -> Mask:
        """Every token's strongest expert, and those above the threshold."""
        before = weight_before(routed.experts, routed.weights)
        kept: Mask = (before == 0) | ((1 - before) ** 2 * self._of(routed.layer) > self.params.threshold)
        return kept

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        if self.gates:  # what is still in the event is wanted
            return [Choice(c.target) for c in candidates]
        low, w = self.precisions - 1, self._of(event.layer)
        return [
            Choice(low if c.before > 0 and (1 - c.before) ** 2 * w <= self.params.threshold else c.target)
            for c in candidates
        ]

    def _of(self, layer: int) -> float:
        return self.by_layer[layer] if self.by_layer else 1.0
