"""What the recorded passes that went most like this one went on to use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.traces.profiles import expert_maps, sketches, unit_rows
from cache.traces.trace import Trace
from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.ranking import Tokens, ranked_ahead


@dataclass(frozen=True)
class ExpertMapParams:
    """`maps`: how many passes of a profile are kept; `nearest`: how many of them are asked."""

    maps: int = 1000
    nearest: int = 16

    def __post_init__(self) -> None:
        if min(self.maps, self.nearest) < 1:
            raise ValueError(f"maps {self.maps} and nearest {self.nearest} must be positive")


@register
class ExpertMap(Predictor):
    """How many of the nearest recorded trajectories used an expert, of those that were like this pass up to here.

    A map is the router's probabilities in all layers of one pass. They are compared by the cosine of the layers of this
    pass so far. Before its first layer they are compared by the embeddings of what the passes read, where the profile
    has these and somebody says what this pass reads; else the same maps' first layers stand in. The paper asks the one
    nearest map, which gives no more candidates than a token needs, and takes as many of its experts as the distance
    asks for; here the answer of several is the probability, and with one alone (`nearest=1`) it is that map's own. The
    maps kept are evenly spaced passes, rather than the most different. Where scores were not recorded, probabilities
    are the used experts' shares of the weight.

    Source: Yu et al., FineMoE (fMoE), arXiv 2502.05370.
    """

    name = "expert-map"
    Params = ExpertMapParams
    learns = True
    _maps: NDArray[np.float64]  # [L, P, E]
    _used: NDArray[np.bool_]  # [L, P, E]: among the map's K likeliest
    _lengths: NDArray[np.float64]  # [L, P]: of each map's layers up to that one
    _read: NDArray[np.float64] | None = None  # [P, D]: what each map's pass read, of length 1
    _top_k = 1

    def learn(self, profile: Trace) -> None:
        maps = expert_maps(profile, self.params.maps)
        self._lengths = np.sqrt((maps**2).sum(axis=2).cumsum(axis=1)).T + 1e-30
        self._maps = np.ascontiguousarray(maps.swapaxes(0, 1))
        likeliest = np.argsort(-self._maps, axis=2, kind="stable")[:, :, : profile.top_k]
        self._used = np.zeros(self._maps.shape, np.bool_)
        np.put_along_axis(self._used, likeliest, True, axis=2)
        self._used &= self._maps > 0
        read = sketches(profile, self.params.maps)
        self._read = None if read is None else unit_rows(read)
        self.reads = read is not None
        self._top_k = profile.top_k

    def reset(self) -> None:
        super().reset()
        self._event: RoutingEvent | None = None
        self._tokens = Tokens()
        self._count = 1
        self._products: NDArray[np.float64] | None = None
        self._nearest = np.zeros(0, np.int64)
        self._length = 0.0  # of this pass so far, squared
        self.similarity = None

    def observe(self, event: RoutingEvent) -> None:
        last = self._event
        if self._products is None or last is None or last[:2] != event[:2]:
            self._start()
        assert self._products is not None
        self._event = event
        self._count = self._tokens.of(event)
        probabilities = self._probabilities(event)
        self._products += self._maps[event.layer] @ probabilities
        # Of the cosine what differs between maps; rounded, so that what is equally near stays so on other machines.
        nearness = np.round(self._products / self._lengths[event.layer], 9)
        self._nearest = np.argsort(-nearness, kind="stable")[: self.params.nearest]
        self._length += float(probabilities @ probabilities)
        self.similarity = float(np.clip(nearness[self._nearest[0]] / (self._length + 1e-30) ** 0.5, 0.0, 1.0))

    def begin(self, event: RoutingEvent) -> None:
        assert event.opening is not None
        embedding, read = event.opening.embedding, self._read
        if embedding is None or read is None:
            return
        self._event, self._count = event, len(event.opening.ids)
        self._start()
        # Row by row: a matrix product may add up differently from run to run.
        nearness = np.round((read * embedding).sum(axis=1) / (np.linalg.norm(embedding) + 1e-30), 9)
        self._nearest = np.argsort(-nearness, kind="stable")[: self.params.nearest]
        self.similarity = float(np.clip(nearness[self._nearest[0]], 0.0, 1.0))

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        most = 2 * (len(event.experts) or min(self._count * self._top_k, self.num_experts))
        return ranked_ahead(event, self._count, depth, self.num_layers, self._share_of, most)

    def _start(self) -> None:
        """A pass begins."""
        self._products = np.zeros(self._maps.shape[1])
        self._length = 0.0

    def _share_of(self, layer: int) -> NDArray[np.float64]:
        if self.params.nearest == 1:
            own: NDArray[np.float64] = self._maps[layer, self._nearest[0]]
            return own
        share: NDArray[np.float64] = self._used[layer, self._nearest].mean(axis=0)
        return share

    def _probabilities(self, event: RoutingEvent) -> NDArray[np.float64]:
        """The router's, [E], or each needed expert's share of the weight."""
        if event.scores is not None:
            raised = np.exp(event.scores - event.scores.max(), dtype=np.float64)
            probabilities: NDArray[np.float64] = raised / raised.sum()
            return probabilities
        shares = np.zeros(self.num_experts)
        total = sum(event.weights)
        if total > 0:
            shares[list(event.experts)] = np.array(event.weights) / total
        return shares
