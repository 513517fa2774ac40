"""Cache-Prior: the router is told what is there before it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.errors import PolicyError
from cache.types import RoutingEvent
from offload.decide.fallbacks.base import Candidate, Choice, Fallback, register


@dataclass(frozen=True)
class Params:
    """`strength` is the paper's lambda. The `keep` likeliest experts of a token are never displaced."""

    strength: float = 0.5
    keep: int = 1

    def __post_init__(self) -> None:
        if self.strength < 0 or self.keep < 0:
            raise PolicyError(f"cache-prior: strength={self.strength} and keep={self.keep} are at least 0")


@register
class CachePrior(Fallback):
    """The router's logits of resident experts are raised by `strength` times the average range of a token's logits,
    before the best are chosen. What is chosen keeps the weight that the unchanged logits give it.

    Source: Cache-Prior, arXiv 2412.00099, with the average of all tokens so far, layer by layer. Only for families
    whose router is a softmax of a linear layer and takes the best: others are refused, see offload/layers/prior.py.
    """

    name = "cache-prior"
    needs_lower = False
    Params = Params

    def __init__(self, num_layers: int, num_experts: int, precisions: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, precisions, params)
        self._ranges = [(0.0, 0)] * num_layers  # their sum, and of how many tokens

    def raise_by(self, layer: int, ranges: Sequence[float]) -> float:
        """By how much to raise, given the ranges of the logits of the tokens to come, which count."""
        total, tokens = self._ranges[layer]
        total, tokens = self._ranges[layer] = total + sum(ranges), tokens + len(ranges)
        return float(self.params.strength * total / max(tokens, 1))

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(candidate.target) for candidate in candidates]
