"""EdgeMoE: a fixed precision for each expert, from what it does to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cache.errors import PolicyError
from cache.types import ExpertKey, RoutingEvent
from offload.decide.fallbacks.base import LOW_SHARE, Candidate, Choice, Fallback, Sensitivity, register


@dataclass(frozen=True)
class Params:
    """The budget is the importance that the experts at the lowest precision may have together: `loss` as a share of all
    importance, or `most` in the unit of importances, which is nats a token where `offload calibrate` measured them, and
    router weight in a replay."""

    loss: float = 0.2
    most: float | None = None
    low_share: float = LOW_SHARE

    def __post_init__(self) -> None:
        if self.loss < 0 or (self.most is not None and self.most < 0):
            raise PolicyError(f"edgemoe: loss={self.loss} and most={self.most} are not negative")


@register
class EdgeMoE(Fallback):
    """The least important experts are always at the lowest precision, as many as the loss budget allows; nothing is
    chosen on a miss.

    Source: EdgeMoE, arXiv 2308.14352, which measures the loss with one expert degraded at a time; `offload calibrate`
    estimates it. Raises PolicyError without a calibration.
    """

    name = "edgemoe"
    needs_calibration: ClassVar[bool] = True
    Params = Params

    def learn(self, sensitivity: Sensitivity) -> None:
        super().learn(sensitivity)
        importance = sensitivity.importance
        if not importance:
            raise PolicyError('fallback "edgemoe" needs to know what experts matter: run `offload calibrate` first')
        most = self.params.most
        budget = self.params.loss * sum(importance.values()) if most is None else most
        self._low: set[ExpertKey] = set()
        degradable = importance.keys() - set(sensitivity.super_experts)
        for key in sorted(degradable, key=lambda key: (importance[key], key)):
            budget -= importance[key]
            if budget < 0:
                break
            self._low.add(key)

    def target(self, key: ExpertKey) -> int:
        return self.precisions - 1 if key in self._low else 0

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(candidate.target) for candidate in candidates]
