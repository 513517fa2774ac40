"""The best precision that arrives before the layer would wait. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache.types import RoutingEvent
from offload.decide.fallbacks.base import LOW_SHARE, Candidate, Choice, Fallback, register


@dataclass(frozen=True)
class Params:
    """`patience` is how long an event may wait, in times of what computing its experts takes."""

    patience: float = 0.5
    low_share: float = LOW_SHARE


@register
class Deadline(Fallback):
    """Missing experts are served in order of weight, each at the best precision whose transfer, behind those decided
    before it, ends while there is something to compute, or within the patience; otherwise at the one that is there
    soonest. What was served below its target and is not held yet is fetched later, if the channel has time.

    Transfers are timed by running averages, so what the model says depends on the machine, and two runs may differ.
    """

    name = "deadline"
    Params = Params

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        choices: dict[int, Choice] = {}
        there = len(event.experts) - len(candidates)
        each_s = spare_s / there if there else self._each_s
        if there:
            self._each_s = each_s
        deadline_s = spare_s + self.params.patience * each_s * len(event.experts)
        channel_s = 0.0
        for index in reversed(range(len(candidates))):
            candidate = candidates[index]
            precision = next(
                (p for p in range(candidate.target, self.precisions) if channel_s + candidate.fetch_s[p] <= deadline_s),
                None,
            )
            if precision is None:
                precision = min(range(candidate.target, self.precisions), key=lambda p: candidate.fetch_s[p])
            channel_s += candidate.fetch_s[precision]
            deadline_s += each_s
            choices[index] = Choice(precision, later=precision > candidate.target and channel_s <= deadline_s)
        return [choices[index] for index in range(len(candidates))]

    _each_s = 0.0
