"""Every expert, whatever the router will say."""

from __future__ import annotations

import numpy as np

from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.ranking import Tokens, of_any_token, ranked, tokens_ahead


@register
class Every(Predictor):
    """Each expert of the layers that come next is as likely as any other.

    For prefetch rules that go through the layers in their order and ask no router, such as `ring`.

    Source: folklore; SE-MoE, arXiv 2205.10034, loads so.
    """

    name = "every"

    def reset(self) -> None:
        super().reset()
        self._event: RoutingEvent | None = None
        self._counter = Tokens()
        self._tokens = 1

    def observe(self, event: RoutingEvent) -> None:
        self._event = event
        self._tokens = self._counter.of(event)

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        share = np.full(self.num_experts, self._counter.share(self.num_experts))
        found: list[Prediction] = []
        for lead in range(1, min(depth, self.num_layers) + 1):
            needed = of_any_token(share, tokens_ahead(event, self._tokens, lead, self.num_layers))
            found += ranked((event.layer + lead) % self.num_layers, lead, needed, self.num_experts)
        return found
