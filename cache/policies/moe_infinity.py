"""Activation ratio within the sequence, early layers favoured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Touch
from cache.policy import EvictionPolicy, register
from cache.traces.profiles import activation_matrices, unit_rows
from cache.traces.trace import Trace


@dataclass(frozen=True)
class MoEInfinityParams:
    """`collection`: how many sequences of a profile are kept to be matched."""

    collection: int = 120

    def __post_init__(self) -> None:
        if self.collection < 1:
            raise ValueError(f"collection is {self.collection}, not positive")


@register
class MoEInfinity(EvictionPolicy):
    """Evict the expert with the lowest ratio (1 - l/L): its part of its layer's tokens, its layer of L; ties by LRU.

    The ratio is counted in the sequence itself. With a profile it is that of the recorded sequence whose activation
    matrix is nearest to this one's, by the mean cosine over layers, after the latest whole forward pass; the sequences
    kept are evenly spaced ones, rather than the most different. Source: Xue et al., MoE-Infinity, arXiv 2401.14361.
    """

    name = "moe-infinity"
    Params = MoEInfinityParams
    _collection: NDArray[np.float64] | None = None  # [S, L * E], of rows of length 1
    _ratios: NDArray[np.float64]  # [S, L, E]

    def learn(self, profile: Trace) -> None:
        matrices = activation_matrices(profile, self.params.collection)
        self._ratios = matrices / np.maximum(matrices.sum(axis=2, keepdims=True), 1)
        self._collection = unit_rows(matrices).reshape(len(matrices), -1)

    def reset(self) -> None:
        super().reset()
        self._tokens = self.zeros()
        self._flat_tokens = self._tokens.reshape(-1)
        layers = np.arange(self.num_layers).repeat(self.num_experts)
        self._early = self.lanes.spread(1 - layers / self.num_layers)
        self._worth = self.zeros()
        if self._collection is not None:
            self._worth[:] = self.lanes.spread(self._ratios.mean(axis=0)) * self._early

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        if touch.new_sequence:
            self._tokens[:] = 0
            if self._collection is None:
                self._worth[:] = 0
        if touch.new_pass and self._collection is not None:
            self._match(self._collection)
        self._flat_tokens[touch.at] += touch.tokens
        if self._collection is None:
            tokens = self._tokens[touch.lanes, touch.columns]
            part = self._early[touch.lanes, touch.columns.start] / np.add.reduce(tokens, axis=1)
            np.multiply(tokens, part[:, None], out=self._worth[touch.lanes, touch.columns])

    def _match(self, collection: NDArray[np.float64]) -> None:
        """Take the ratios of each sequence's nearest one; of all together where there is nothing to compare yet."""
        seen = self._tokens.reshape(-1, self.num_layers, self.num_experts)
        # Rounded, so that what is equally near stays so whatever else is computed beside it.
        nearness = np.round(unit_rows(seen).reshape(len(seen), -1) @ collection.T, 9)
        ratios = self._ratios[nearness.argmax(axis=1)]
        ratios[~seen.any(axis=(1, 2))] = self._ratios.mean(axis=0)
        np.multiply(ratios.reshape(self._worth.shape), self._early, out=self._worth)

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        return self._worth[lanes]
