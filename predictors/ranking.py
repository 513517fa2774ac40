"""What predictors share: from probabilities to predictions, and from events to tokens. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.types import ExpertKey, Phase, RoutingEvent
from predictors.base import Prediction

_MOST_BYTES = 2**30


def ranked(layer: int, lead: int, probabilities: NDArray[Any], most: int) -> list[Prediction]:
    """The `most` likeliest of a layer's experts, probabilities [E], those at 0 left out; ties by id."""
    order = np.argsort(-probabilities, kind="stable")[: min(most, np.count_nonzero(probabilities))]
    keys = keys_of(layer, len(probabilities))
    return list(
        map(Prediction, [keys[expert] for expert in order.tolist()], probabilities[order].tolist(), repeat(lead))
    )


def ranked_ahead(
    event: RoutingEvent,
    tokens: int,
    depth: int,
    num_layers: int,
    share_of: Callable[[int], NDArray[Any]],
    most: int | None = None,
) -> list[Prediction]:
    """What `share_of(layer)` [E], a single token's need, says of the `depth` layers after `event`, which has so many
    tokens: up to `most` experts each, by default twice as many as the event needed."""
    found: list[Prediction] = []
    for lead in range(1, min(depth, num_layers) + 1):
        layer = (event.layer + lead) % num_layers
        needed = of_any_token(share_of(layer), tokens_ahead(event, tokens, lead, num_layers))
        found += ranked(layer, lead, needed, most or 2 * len(event.experts))
    return found


@cache
def keys_of(layer: int, num_experts: int) -> list[ExpertKey]:
    """The experts of a layer. Looking keys up takes a quarter of the time of making them."""
    return [ExpertKey(layer, expert) for expert in range(num_experts)]


def check_size(predictor: str, nbytes: int, remedy: str) -> None:
    """Raise PolicyError for tables that would take memory which experts are better kept in."""
    if nbytes > _MOST_BYTES:
        raise PolicyError(f"{predictor} would take {nbytes / 2**30:.1f} GiB for this model, of at most 1: {remedy}")


class Tokens:
    """Counts the tokens of events, which do not say how many experts a token goes to: the fewest seen so far.

    Before the first event of a single token the count is too low, but never lower than an expert's tokens.
    """

    def __init__(self) -> None:
        self._top_k = 0

    def share(self, num_experts: int) -> float:
        """The probability that a token needs an expert of which nothing is known."""
        return self._top_k / num_experts if 0 < self._top_k < num_experts else 0.5

    def of(self, event: RoutingEvent) -> int:
        """How many tokens `event` has, at least 1."""
        needed = len(event.experts)
        if not 0 < self._top_k <= needed:
            self._top_k = needed
        if needed == self._top_k and max(event.tokens, default=1) == 1:
            return 1
        return max(1, *event.tokens, round(sum(event.tokens) / max(1, self._top_k)))


def tokens_ahead(event: RoutingEvent, tokens: int, lead: int, num_layers: int) -> int:
    """How many tokens the event `lead` layers on will have: as many in this pass; the next one decodes, we assume."""
    same_pass = event.layer + lead < num_layers
    return tokens if same_pass or event.phase is Phase.DECODE else 1


def expected_of(need: NDArray[Any]) -> int:
    """How many of the experts that are needed with these probabilities [E] will be, at least 1."""
    return max(1, round(float(need.sum())))


def of_any_token(probabilities: NDArray[Any], tokens: int) -> NDArray[Any]:
    """The probability that one of several independent tokens needs an expert, from that of a single token's need."""
    return probabilities if tokens == 1 else 1 - (1 - probabilities) ** tokens
