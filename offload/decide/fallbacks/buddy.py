"""BuddyMoE: a missing expert is replaced by one like it that is there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cache.errors import PolicyError
from cache.types import ExpertKey, RoutingEvent
from offload.decide.fallbacks.base import Candidate, Choice, Fallback, Sensitivity, register


@dataclass(frozen=True)
class Params:
    """Experts are buddies from a `similarity` of their gates on, 1 being the same; one with more than the share `most`
    of an event's router weight is waited for. With `later`, what was replaced is fetched behind everything else."""

    similarity: float = 0.3
    most: float = 0.5
    later: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.similarity <= 1:
            raise PolicyError(f"buddy: similarity={self.similarity} lies between 0 and 1")


@register
class Buddy(Fallback):
    """A missing expert is replaced by the most similar one of its layer that is resident and that the event does not
    use yet; where none is similar enough it is waited for.

    Source: BuddyMoE, which finds similar experts by how often they are chosen together. Ours compares the gate's rows,
    by their cosine: what the router likes alike. That needs no calibration. With `later`, what the model says depends
    on when transfers land.
    """

    name = "buddy"
    needs_lower = False
    needs_similarity: ClassVar[bool] = True
    Params = Params

    def learn(self, sensitivity: Sensitivity) -> None:
        super().learn(sensitivity)
        if sensitivity.similarity is None:
            raise PolicyError('fallback "buddy" needs to know which experts are similar')
        self._buddies: dict[ExpertKey, list[ExpertKey]] = {}
        for layer, rows in enumerate(sensitivity.similarity):
            for expert, row in enumerate(rows):
                order = np.argsort(-row, kind="stable")
                self._buddies[ExpertKey(layer, expert)] = [
                    ExpertKey(layer, int(other))
                    for other in order
                    if other != expert and row[other] >= self.params.similarity
                ]
        if not any(self._buddies.values()):
            others = sensitivity.similarity - 2 * np.eye(self.num_experts, dtype=np.float32)
            warnings.warn(
                "fallback buddy replaces nothing: no two experts of a layer are as similar as "
                f"{self.params.similarity:g}, the most similar are {others.max():.2f}; see buddy(similarity=...)",
                stacklevel=2,
            )

    def stand_ins(self, key: ExpertKey) -> Sequence[ExpertKey]:
        return self._buddies[key]

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [
            Choice(c.target)
            if c.stand_in is None or c.share > self.params.most
            else Choice(c.target, self.params.later, c.stand_in)
            for c in candidates
        ]
