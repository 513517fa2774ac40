"""HOBBIT: by how much weight comes before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache.errors import PolicyError
from cache.types import RoutingEvent
from offload.decide.fallbacks.base import LOW_SHARE, SKIP, Candidate, Choice, Fallback, register


@dataclass(frozen=True)
class Params:
    """Up to a cumulative share `t1` of the experts before it, an expert is fetched at the best precision, up to `t2` at
    the lowest; what is behind is left out with `skip`, else has the lowest precision, too."""

    t1: float = 0.6
    t2: float = 0.9
    skip: bool = False
    low_share: float = LOW_SHARE

    def __post_init__(self) -> None:
        if not 0 <= self.t1 <= self.t2:
            raise PolicyError(f"hobbit: t1={self.t1} and t2={self.t2} must ascend from 0")


@register
class Hobbit(Fallback):
    """A missing expert's score is the router weight of all stronger experts of a token, as a share.

    Several tokens of a prompt or a batch may need it: the one with the least score decides, so an expert is left out
    only if every token would.

    Source: HOBBIT, arXiv 2411.01433: thresholds .6 and .9 fetch 67, 30 and 3 % of Mixtral's misses at high precision,
    at low, and not at all.
    """

    name = "hobbit"
    by_token = True
    Params = Params

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        lowest = self.precisions - 1
        t1, t2, skip = self.params.t1, self.params.t2, self.params.skip
        return [Choice(c.target if c.before <= t1 else SKIP if skip and c.before > t2 else lowest) for c in candidates]
