"""A fallback that never falls back, for tests: what is missing is fetched at the best precision."""

from __future__ import annotations

from collections.abc import Sequence

from cache.types import RoutingEvent
from offload.decide.fallbacks.base import Candidate, Choice, Fallback


class AlwaysBest(Fallback):
    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(candidate.target) for candidate in candidates]
