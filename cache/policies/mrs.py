"""Minus recent score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Touch
from cache.policy import EvictionPolicy, register


@dataclass(frozen=True)
class MRSParams:
    """`alpha`: how much the latest pass counts; `top_p`: how many experts score in it, by default twice those used."""

    alpha: float = 0.5
    top_p: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, not in (0, 1]")
        if self.top_p is not None and self.top_p < 1:
            raise ValueError(f"top_p is {self.top_p}, not positive")


@register
class MRS(EvictionPolicy):
    """Evict the expert with the lowest moving average of router probabilities; ties by LRU.

    In every event of a layer S becomes alpha s + (1 - alpha) S, where s is the softmax of the router's scores, averaged
    over the event's tokens, for the `top_p` experts of the highest scores, and 0 for all others. Where scores were
    not recorded, s are the used experts' shares of the weight. Source: Zhong et al., HybriMoE, arXiv 2504.05897.
    """

    name = "mrs"
    Params = MRSParams
    uses_scores = True

    def reset(self) -> None:
        super().reset()
        self._score = self.zeros()
        self._flat_score = self._score.reshape(-1)

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        alpha = self.params.alpha
        block = self._score[touch.lanes, touch.columns]
        block *= 1 - alpha
        if touch.scores is None:
            self._flat_score[touch.at] += alpha * touch.shares()
            return
        probabilities = touch.probabilities()
        num_experts = probabilities.shape[1]
        ascending = np.sort(probabilities, axis=1)
        if touch.sizes is None or self.params.top_p:
            top = self.params.top_p or 2 * touch.at.shape[1]
            lowest = ascending[:, max(num_experts - top, 0), None]
        else:
            places = np.maximum(num_experts - 2 * touch.sizes, 0)
            lowest = ascending[np.arange(len(places)), places, None]
        probabilities *= probabilities >= lowest
        probabilities *= alpha
        block += probabilities

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        return self._score[lanes]
