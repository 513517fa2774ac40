"""Wait for the expert as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cache.types import RoutingEvent
from offload.decide.fallbacks.base import Candidate, Choice, Fallback, register


@register
class NoFallback(Fallback):
    """Every expert is computed at the best precision: lossless with respect to it."""

    name = "none"
    lossy: ClassVar[bool] = False
    needs_lower = False

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(candidate.target) for candidate in candidates]
