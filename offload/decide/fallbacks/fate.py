"""Fate: while prompts are read, few bits for the experts that few tokens need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache.errors import PolicyError
from cache.types import Phase, RoutingEvent
from offload.decide.fallbacks.base import LOW_SHARE, Candidate, Choice, Fallback, register


@dataclass(frozen=True)
class Params:
    """`share` of an event's experts, rounded down, have the lowest precision while a prompt is read."""

    share: float = 0.25
    low_share: float = LOW_SHARE

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise PolicyError(f"fate: share={self.share} lies between 0 and 1")


@register
class Fate(Fallback):
    """While prompts are read, the experts of an event with the fewest tokens, and of these the ones with the least
    weight, have the lowest precision. All others, and all while replies are made, have the best one.

    Source: Fate, arXiv 2502.12224: INT2 for the 25 % least popular, INT4 for the rest. There a weak PC decodes at INT2
    what was predicted wrongly; here nothing is degraded on a miss.
    """

    name = "fate"
    Params = Params

    def targets(self, event: RoutingEvent) -> list[int]:
        found = [0] * len(event.experts)
        if event.phase is Phase.PREFILL:
            rarest = sorted(range(len(found)), key=lambda i: event.tokens[i])  # stable: members ascend in weight
            for index in rarest[: int(self.params.share * len(found))]:
                found[index] = self.precisions - 1
        return found

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(candidate.target) for candidate in candidates]
