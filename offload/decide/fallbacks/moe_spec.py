"""MoE-Spec: a pass of several tokens has a budget of experts in every layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.errors import PolicyError
from cache.traces.by_token import Mask, Routed
from cache.types import RoutingEvent
from offload.decide.fallbacks.base import Candidate, Choice, Fallback, Sensitivity, register


@dataclass(frozen=True)
class Params:
    """`budget` experts of a layer are run, by default half of them. With `all_passes` prompts have the budget, too;
    with `renormalise` a token's other experts take over the weight of what it loses."""

    budget: int = 0
    all_passes: bool = False
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise PolicyError(f"moe-spec: budget={self.budget} is a number of experts, or 0 for half of a layer's")


@register
class MoESpec(Fallback):
    """In a pass that goes on with several tokens, the `budget` experts with the most router weight are run, of all its
    tokens together; tokens do without the others, resident or not.

    Such passes are those in which `generate` verifies guesses, and those of batches. What verifies outside of
    `generate` cannot be told from a prompt: it takes `all_passes`.

    Source: MoE-Spec, arXiv 2602.16052, which sums the probabilities of all experts: here an expert has the weights of
    the tokens that chose it. It drops (the paper's truncation), and puts no other expert in the place.
    """

    name = "moe-spec"
    needs_lower = False
    gates = True
    Params = Params

    def __init__(self, num_layers: int, num_experts: int, precisions: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, precisions, params)
        self._budget = self.params.budget or max(num_experts // 2, 1)
        self.renormalises = self.params.renormalise

    def learn(self, sensitivity: Sensitivity) -> None:
        """Warns of a budget that holds a whole layer."""
        super().learn(sensitivity)
        if self._budget >= self.num_experts:
            warnings.warn(
                f"moe-spec(budget={self._budget}) drops nothing: a layer has {self.num_experts} experts", stacklevel=2
            )

    def keep(self, routed: Routed) -> Mask:
        """The pairs with an expert within the budget."""
        if len(routed.experts) == 1 or not (routed.continues or self.params.all_passes):
            return super().keep(routed)
        totals = np.bincount(routed.experts.ravel(), routed.weights.ravel(), self.num_experts)
        used = np.unique(routed.experts)
        best = used[np.argsort(totals[used], kind="stable")[-self._budget :]]  # of equals the higher ids, as in events
        return np.isin(routed.experts, best)

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(candidate.target) for candidate in candidates]
