"""What each token went to before, wherever it stood."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.trace import PADDING, Trace
from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.ranking import Tokens, check_size, ranked_in_pass


@dataclass(frozen=True)
class TokenIdsParams:
    """`tokens`: of how many different tokens, the latest, it is remembered where they went. `doubt`: how many uses of a
    token weigh as much as what all tokens do."""

    tokens: int = 4096
    doubt: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.doubt <= 0:
            raise ValueError(f"tokens is {self.tokens}, at least 1; doubt is {self.doubt}, above 0")


@register
class TokenIds(Predictor):
    """The share of a token's uses that went to an expert, mixed with that of all tokens; needed by any token of a pass.

    Many routers decide by the token itself, whatever stands before it, and do so early in training. So a table by ids
    knows a pass before its first layer. It is counted from a profile that has ids, and while running from passes of one
    token: of several nobody says which of them needed an expert. It takes 4 tokens L E bytes, 100 MB for 48 layers of
    128 experts.

    Source: the finding from Xue et al., OpenMoE, arXiv 2402.01739; the method is this project's.
    """

    name = "token-ids"
    Params = TokenIdsParams
    reads = True

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        chosen = TokenIdsParams() if params is None else params
        check_size(self.name, 4 * chosen.tokens * num_layers * num_experts, f"lower tokens, now {chosen.tokens}")
        self._learnt: dict[int, NDArray[np.float32]] = {}
        self._learnt_of_all = np.zeros((num_layers, num_experts + 1))
        super().__init__(num_layers, num_experts, chosen)

    def learn(self, profile: Trace) -> None:
        real = profile.phase != PADDING
        experts = profile.experts[real]
        for layer in range(self.num_layers):
            of_all = np.bincount(experts[:, layer].ravel(), minlength=self.num_experts)
            self._learnt_of_all[layer] = [*of_all, len(experts)]
        if profile.ids is None:
            return
        layers = np.arange(self.num_layers)[:, None]
        for token, went in zip(profile.ids[real].tolist(), experts, strict=True):
            counts = self._learnt.pop(token, None)
            if counts is None:
                counts = self._nothing()
            counts[layers, went] += 1
            counts[:, -1] += 1
            self._learnt[token] = counts
        for token in list(self._learnt)[: -self.params.tokens]:
            del self._learnt[token]

    def reset(self) -> None:
        super().reset()
        # Of each token and of all, [L, E + 1]: how often it went to each expert, and last how often it came.
        self._of = {token: counts.copy() for token, counts in self._learnt.items()}
        self._of_all = self._learnt_of_all.copy()
        self._event: RoutingEvent | None = None
        self._ids: tuple[int, ...] = ()
        self._tokens = Tokens()
        self._need: NDArray[np.float64] | None = None

    def begin(self, event: RoutingEvent) -> None:
        assert event.opening is not None
        self._event, self._ids = event, event.opening.ids
        none_needs = np.zeros((self.num_layers, self.num_experts))  # log-probabilities
        for token, count in Counter(self._ids).items():
            none_needs += count * np.log1p(-np.minimum(self._shares_of(token), 1 - 1e-9))
        self._need = -np.expm1(none_needs)

    def observe(self, event: RoutingEvent) -> None:
        last = self._event
        if last is None or last[:2] != event[:2]:  # nobody has said what it reads
            self._ids, self._need = (), None
        self._event = event
        experts = list(event.experts)
        self._of_all[event.layer, experts] += event.tokens
        self._of_all[event.layer, -1] += self._tokens.of(event)
        if len(self._ids) == 1:
            counts = self._counts_of(self._ids[0])
            counts[event.layer, experts] += 1
            counts[event.layer, -1] += 1

    def predict(self, depth: int) -> list[Prediction]:
        event, need = self._event, self._need
        return [] if event is None or need is None else ranked_in_pass(event, depth, need)

    def _shares_of(self, token: int) -> NDArray[np.float64]:
        """[L, E]: of the uses of a token those that went to each expert."""
        doubt = self.params.doubt
        of_all: NDArray[np.float64] = self._of_all[:, :-1] / np.maximum(self._of_all[:, -1:], 1)
        counts = self._of.get(token)
        if counts is None:
            return of_all
        shares: NDArray[np.float64] = (counts[:, :-1] + doubt * of_all) / (counts[:, -1:] + doubt)
        return shares

    def _counts_of(self, token: int) -> NDArray[np.float32]:
        """Where a token went, to be counted on: it is the latest now."""
        found = self._of.pop(token, None)
        counts = self._nothing() if found is None else found
        if found is None and len(self._of) >= self.params.tokens:
            del self._of[next(iter(self._of))]
        self._of[token] = counts
        return counts

    def _nothing(self) -> NDArray[np.float32]:
        return np.zeros((self.num_layers, self.num_experts + 1), np.float32)
