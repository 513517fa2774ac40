"""What the recorded sequence that is most like this one went on to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.traces.profiles import activation_matrices, unit_rows
from cache.traces.trace import Trace
from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.ranking import Tokens, ranked_ahead


@dataclass(frozen=True)
class ActivationMatrixParams:
    """`collection`: how many sequences of a profile are kept to be matched."""

    collection: int = 120

    def __post_init__(self) -> None:
        if self.collection < 1:
            raise ValueError(f"collection is {self.collection}, not positive")


@register
class ActivationMatrix(Predictor):
    """The expert's share of its layer's tokens in a sequence: the recorded one nearest to this one, or this one itself.

    A sequence is the matrix of how many tokens went to each expert of each layer. At every pass that of the sequence so
    far is compared with those of a profile, by the mean cosine over layers, and the nearest one's shares are the
    probabilities; until there is something to compare, those of all of them together. Without a profile they are the
    sequence's own so far. The matrices kept are evenly spaced ones, rather than the most different. The order of
    fetching, which the paper derives from the share and the distance in layers, is up to whoever fetches.

    Source: Xue et al., MoE-Infinity, arXiv 2401.14361.
    """

    name = "activation-matrix"
    Params = ActivationMatrixParams
    _collection: NDArray[np.float64] | None = None  # [S, L * E], of rows of length 1
    _shares: NDArray[np.float64]  # [S, L, E], of the tokens
    _mean: NDArray[np.float64]  # [L, E]

    def learn(self, profile: Trace) -> None:
        matrices = activation_matrices(profile, self.params.collection)
        self._shares = _of_tokens(matrices, profile.top_k)
        self._mean = _of_tokens(matrices.sum(axis=0), profile.top_k)
        self._collection = unit_rows(matrices).reshape(len(matrices), -1)

    def reset(self) -> None:
        super().reset()
        self._event: RoutingEvent | None = None
        self._tokens = Tokens()
        self._count = 1
        self._seen = np.zeros((self.num_layers, self.num_experts))
        self._passed = np.zeros(self.num_layers)
        self._expected: NDArray[np.float64] | None = None  # the nearest one's shares, [L, E]

    def observe(self, event: RoutingEvent) -> None:
        last = self._event
        if last is None or last.sequence != event.sequence:
            self._seen[:] = 0
            self._passed[:] = 0
        if self._collection is not None and (last is None or last[:2] != event[:2]):
            self._expected = self._mean
            if self._seen.any():
                # Rounded, so that what is equally near stays so whatever else is computed beside it.
                nearness = np.round(self._collection @ unit_rows(self._seen).ravel(), 9)
                self._expected = self._shares[nearness.argmax()]
        self._event = event
        self._count = self._tokens.of(event)
        self._seen[event.layer, list(event.experts)] += event.tokens
        self._passed[event.layer] += self._count

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        return ranked_ahead(event, self._count, depth, self.num_layers, self._shares_of)

    def _shares_of(self, layers: Sequence[int]) -> NDArray[np.float64]:
        known = self._expected
        if known is not None:
            return known[layers]
        # One token more: a single use is no certainty.
        shares: NDArray[np.float64] = self._seen[layers] / (self._passed[layers] + 1)[:, None]
        return shares


def _of_tokens(matrices: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """The share of the tokens that went to each expert, from how many did, [.., L, E]."""
    shares: NDArray[np.float64] = matrices * top_k / np.maximum(matrices.sum(axis=-1, keepdims=True), 1)
    return np.minimum(shares, 1)
