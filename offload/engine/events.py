"""What the model routes, made into the events that the manager decides about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.traces.ahead import Ahead, rank_ahead
from cache.traces.by_token import ByToken
from cache.traces.passes import mean_scores
from cache.types import Opening, Phase, RoutingEvent, before_first
from offload.layers.router import half_precision

_NOTHING: tuple[Mapping[int, float], int] = ({}, 0)


class Events:
    """The model sets `sequence`, `step`, `phase` and `verifies` before each forward pass; what routers and gates say of
    an event beside its experts may come before it. `by_token` is what is asked of each token then."""

    def __init__(self, by_token: ByToken | None = None) -> None:
        self.by_token = by_token
        self.sequence = 0
        self.step = 0
        self.phase = Phase.PREFILL
        self.verifies = False
        """Whether the pass has several guesses of how its sequences go on."""
        self._scores: dict[int, NDArray[np.float32]] = {}
        self._ahead: dict[int, Ahead] = {}
        self._tokens: dict[int, tuple[Mapping[int, float], int]] = {}
        self._opening: Opening | None = None

    def receive_scores(self, layer: int, scores: torch.Tensor) -> None:
        """The router's scores [tokens, experts] for the event to come, rounded as a trace keeps them."""
        rows = half_precision(scores)
        self._scores[layer] = mean_scores(rows, np.array([len(rows)]))[0]

    def receive_ahead(self, layer: int, predicted: NDArray[np.unsignedinteger[Any]]) -> None:
        """What the next gates say ahead [tokens, D, P] of the event to come."""
        self._ahead[layer] = rank_ahead(predicted)

    def receive_tokens(self, layer: int, before: Mapping[int, float], dropped: int) -> None:
        """What was asked of each token of the event to come: by expert, the least weight before it, if that was asked;
        and how many pairs of a token and an expert were dropped."""
        self._tokens[layer] = before, dropped

    def open(self, ids: torch.Tensor, embeddings: NDArray[np.float16]) -> RoutingEvent:
        """A pass reads `ids` [tokens], whose sketches are `embeddings` [tokens, D]: its beginning as an event."""
        self._opening = Opening(tuple(ids.tolist()), mean_scores(embeddings, np.array([len(ids)]))[0])
        return before_first(self.sequence, self.step, self.phase, self._opening)

    def make(self, layer: int, experts: list[int], weights: list[float], tokens: list[int]) -> RoutingEvent:
        """The event of a layer that uses these experts, with the total weight and the number of tokens of each."""
        members = sorted(zip(weights, experts, tokens, strict=True))
        weights_, experts_, tokens_ = zip(*members, strict=True)
        before, dropped = self._tokens.pop(layer, _NOTHING)
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
            before=tuple([before[expert] for expert in experts_]) if before else (),
            dropped=dropped,
            scores=self._scores.pop(layer, None),
            opening=opening,
        )

    def forget(self) -> None:
        """Nothing was said of events to come."""
        self._scores.clear()
        self._ahead.clear()
        self._tokens.clear()
        self._opening = None
