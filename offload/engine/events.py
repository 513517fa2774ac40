"""What the model routes, made into the events that the manager decides about."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.traces.passes import Ahead, mean_scores, rank_ahead
from cache.types import Opening, Phase, RoutingEvent, before_first
from offload.layers.router import half_precision


class Events:
    """The model sets `sequence`, `step` and `phase` before each forward pass; what routers and gates say of an event
    beside its experts may come before it."""

    def __init__(self) -> None:
        self.sequence = 0
        self.step = 0
        self.phase = Phase.PREFILL
        self._scores: dict[int, NDArray[np.float32]] = {}
        self._ahead: dict[int, Ahead] = {}
        self._opening: Opening | None = None

    def receive_scores(self, layer: int, scores: torch.Tensor) -> None:
        """The router's scores [tokens, experts] for the event to come, rounded as a trace keeps them."""
        rows = half_precision(scores)
        self._scores[layer] = mean_scores(rows, np.array([len(rows)]))[0]

    def receive_ahead(self, layer: int, predicted: NDArray[np.unsignedinteger[Any]]) -> None:
        """What the next gates say ahead [tokens, D, P] of the event to come."""
        self._ahead[layer] = rank_ahead(predicted)

    def open(self, ids: torch.Tensor, embeddings: NDArray[np.float16]) -> RoutingEvent:
        """A pass reads `ids` [tokens], whose sketches are `embeddings` [tokens, D]: its beginning as an event."""
        self._opening = Opening(tuple(ids.tolist()), mean_scores(embeddings, np.array([len(ids)]))[0])
        return before_first(self.sequence, self.step, self.phase, self._opening)

    def make(self, layer: int, experts: list[int], weights: list[float], tokens: list[int]) -> RoutingEvent:
        """The event of a layer that uses these experts, with the total weight and the number of tokens of each."""
        members = sorted(zip(weights, experts, tokens, strict=True))
        weights_, experts_, tokens_ = zip(*members, strict=True)
        opening = None
        if layer == 0:
            opening, self._opening = self._opening, None
        return RoutingEvent(
            self.sequence,
            self.step,
            layer,
            self.phase,
            experts_,
            weights_,
            tokens_,
            ahead=self._ahead.pop(layer, ()),
            scores=self._scores.pop(layer, None),
            opening=opening,
        )

    def forget(self) -> None:
        """Nothing was said of events to come."""
        self._scores.clear()
        self._ahead.clear()
        self._opening = None
