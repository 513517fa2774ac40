"""Frequency times the probability that the router is expected to give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Floats, Touch
from cache.policy import EvictionPolicy, register
from cache.traces.profiles import expert_maps
from cache.traces.trace import Trace


@dataclass(frozen=True)
class FineMoEParams:
    """`distance`: how many layers ahead a map is matched; `maps`: how many of a profile are kept."""

    distance: int = 3
    maps: int = 1000

    def __post_init__(self) -> None:
        if min(self.distance, self.maps) < 1:
            raise ValueError(f"distance {self.distance} and maps {self.maps} must be positive")


@register
class FineMoE(EvictionPolicy):
    """Evict the expert with the highest 1 / (p f): expected router probability, and uses so far; ties by LRU.

    Without a profile p is the mean probability so far. With one it comes from expert maps, the probabilities of
    recorded forward passes: `distance` layers ahead, from the map that is nearest by cosine in the layers of this pass
    so far. The first layers, which the paper matches by the prompt's embedding, take the map that was nearest when
    the pass before was at its end. The maps kept are evenly spaced passes, rather than the most different. Where
    scores were not recorded, probabilities are the used experts' shares of the weight.
    Source: Yu et al., FineMoE (fMoE), arXiv 2502.05370.
    """

    name = "finemoe"
    Params = FineMoEParams
    uses_scores = True
    _maps: NDArray[np.float64] | None = None  # [P, L, E]

    def learn(self, profile: Trace) -> None:
        self._maps = expert_maps(profile, self.params.maps)
        squares = (self._maps**2).sum(axis=2)
        # By layer first, so that what one event reads lies together.
        self._by_layer = np.ascontiguousarray(self._maps.swapaxes(0, 1))  # [L, P, E]
        self._lengths = (np.sqrt(squares.cumsum(axis=1)) + 1e-30).T.copy()  # [L, P]: of the layers up to each
        self._distance = min(self.params.distance, self.num_layers)

    def reset(self) -> None:
        super().reset()
        self._sums = self.zeros()
        self._flat_sums = self._sums.reshape(-1)
        self._expected = self.zeros()
        if self._maps is not None:
            self._expected[:] = self.lanes.spread(self._maps.mean(axis=0))
            models = self._of_models(self._expected)
            self._following = models[:, : self._distance].copy()
            self._products = np.zeros((len(models), len(self._maps)))
            self._squares = np.zeros(len(models))

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        if self._maps is None:
            sums = self._sums[touch.lanes, touch.columns]
            if touch.scores is None:
                self._flat_sums[touch.at] += touch.shares()
            else:
                sums += touch.probabilities()
            np.divide(sums, self.step, out=self._expected[touch.lanes, touch.columns])
            return
        if touch.new_pass:
            self._of_models(self._expected)[:, : self._distance] = self._following
            self._products[:] = 0
            self._squares[:] = 0
        for layer, models, rows in self._layers_of(touch, touch.probabilities()):
            self._match(self._maps, layer, models, rows)

    def _layers_of(self, touch: Touch, probabilities: Floats) -> Iterator[tuple[int, slice, Floats]]:
        """The touched layers one by one: each with the copies of the model, and their probabilities."""
        if self.lanes.layers > 1 or len(probabilities) == 1:
            lane, layers = touch.lanes.start, self.lanes.layers
            first = lane * layers % self.num_layers + touch.columns.start // self.num_experts
            model = lane * layers // self.num_layers
            yield first, slice(model, model + len(probabilities)), probabilities
            return
        rows = probabilities.reshape(-1, self.num_layers, self.num_experts)
        for layer in range(self.num_layers):
            yield layer, slice(0, len(rows)), rows[:, layer]

    def _match(self, maps: NDArray[np.float64], layer: int, models: slice, rows: Floats) -> None:
        self._products[models] += rows @ self._by_layer[layer].T
        self._squares[models] += (rows**2).sum(axis=1)
        # Of the cosine, what differs between maps; rounded, so that what is equally near stays so beside anything else.
        nearness = self._products[models] / self._lengths[layer]
        nearness /= np.sqrt(self._squares[models])[:, None] + 1e-30
        nearest = np.round(nearness, 9).argmax(axis=1)
        ahead = layer + self._distance
        if ahead < self.num_layers:
            self._of_models(self._expected)[models, ahead] = maps[nearest, ahead]
        else:
            ahead -= self.num_layers
            self._following[models, ahead] = maps[nearest, ahead]

    def _of_models(self, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """A state array as [models, L, E]."""
        return state.reshape(-1, self.num_layers, self.num_experts)

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        return self._expected[lanes] * self.uses[lanes]
