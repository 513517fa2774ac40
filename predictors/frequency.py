"""How often each expert was needed lately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.ranking import Tokens, ranked_ahead


@dataclass(frozen=True)
class FrequencyParams:
    """`rate`: by how much a token fades what was seen before it."""

    rate: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}, not between 0 and 1")


@register
class Frequency(Predictor):
    """The share of its layer's recent tokens that went to an expert, older ones counting less and less.

    A pass of several tokens needs an expert unless none of them does. The counterpart of LFU and LRU among predictors:
    it knows nothing of the present pass, so that it can look any number of layers ahead equally well.

    Source: the popularity baselines of most systems, such as Xue et al., MoE-Infinity, arXiv 2401.14361.
    """

    name = "frequency"
    Params = FrequencyParams

    def reset(self) -> None:
        super().reset()
        self._event: RoutingEvent | None = None
        self._tokens = Tokens()
        self._count = 1
        self._uses = np.zeros((self.num_layers, self.num_experts))  # faded, of ...
        self._seen = np.zeros(self.num_layers)  # ... so many tokens, faded alike

    def observe(self, event: RoutingEvent) -> None:
        self._event = event
        self._count = self._tokens.of(event)
        kept = (1 - self.params.rate) ** self._count
        counted = (1 - kept) / self.params.rate / self._count  # of each token, on average
        uses = self._uses[event.layer]
        uses *= kept
        uses[list(event.experts)] += np.array(event.tokens) * counted
        self._seen[event.layer] = self._seen[event.layer] * kept + counted * self._count

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        return ranked_ahead(event, self._count, depth, self.num_layers, self._shares_of)

    def _shares_of(self, layers: Sequence[int]) -> NDArray[np.float64]:
        # One token more, that went nowhere: a single use is no certainty.
        shares: NDArray[np.float64] = self._uses[layers] / (self._seen[layers] + 1)[:, None]
        return shares
