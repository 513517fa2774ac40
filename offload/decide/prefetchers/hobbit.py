"""The nearest layer that will miss something, and no other."""

from __future__ import annotations

from dataclasses import dataclass

from cache.types import RoutingEvent
from offload.decide.prefetchers.base import Outlook, PrefetchRule, register
from predictors.base import Prediction

_WEIGHT = 0.05
"""What the latest event counts in the mean shares by rank."""


@dataclass(frozen=True)
class Params:
    """`mixed`: whether a lesser choice is fetched at the lowest precision, and the least not at all. It is one where
    stronger choices have more than the share `high` of the router's weight, and the least where they have more than
    `low`."""

    mixed: bool = True
    high: float = 0.6
    low: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.high <= self.low <= 1:
            raise ValueError(f"high {self.high} and low {self.low} must be shares, in this order")


@register
class Hobbit(PrefetchRule):
    """Looks through the layers ahead, and stops at the first of which an expected expert is missing: all those of it
    that are missing are fetched.

    Only the K likeliest of a layer are expected. With several precisions, each is fetched at the one that its place
    among them usually calls for: by the share of the router's weight that goes to stronger choices, as HOBBIT's
    fallback does. The next gates' own weights are not known, so the shares are means over the events seen.

    Source: Tang et al., HOBBIT, arXiv 2411.01433. AdapMoE, 2408.10284, goes on to the next layer in the same way, at
    one precision.
    """

    name = "hobbit"
    Params = Params
    reach = 3

    def reset(self) -> None:
        self._shares: list[float] = []

    def choose(self, outlook: Outlook) -> None:
        self._remember(outlook.event)
        for lead in range(1, outlook.depth + 1):
            wanted = outlook.expected(lead)[: outlook.top_k]
            missing = [(rank, each) for rank, each in enumerate(wanted) if outlook.is_absent(each)]
            for rank, prediction in missing:
                self._fetch(outlook, rank, prediction)
            if missing:
                return

    def _fetch(self, outlook: Outlook, rank: int, prediction: Prediction) -> None:
        precision = None
        if self.params.mixed and outlook.precisions > 1:
            before = sum(self._shares[:rank])
            if before > self.params.low:
                return
            if before > self.params.high:
                precision = outlook.precisions - 1
                if not outlook.lacks(prediction.key, precision):
                    return
        offer = outlook.offer(prediction, precision)
        if offer.find_room():
            offer.begin()

    def _remember(self, event: RoutingEvent) -> None:
        """Take the shares of one more event into account, the heaviest first."""
        total = sum(event.weights) or 1.0
        shares = [weight / total for weight in reversed(event.weights)]
        if len(shares) != len(self._shares):
            self._shares = shares
            return
        self._shares = [old + _WEIGHT * (new - old) for old, new in zip(self._shares, shares, strict=True)]
