"""A low-precision copy of every expert that is always there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cache.types import RoutingEvent
from offload.decide.fallbacks.base import Candidate, Choice, Fallback, register


@register
class ResidentLow(Fallback):
    """What is missing is computed from a copy at the lowest precision that host memory has of every expert, and fetched
    meanwhile: when it has arrived it is computed at the best one.

    What the model says depends on when transfers land, so two runs may differ. Where an accelerator computes, the copy
    still has to cross the link.
    """

    name = "resident-low"
    keeps_low: ClassVar[bool] = True

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(self.precisions - 1, later=True) for _ in candidates]
