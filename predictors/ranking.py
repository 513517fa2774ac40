"""What predictors share: from probabilities to predictions, and from events to tokens. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
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
    return ranked_each([layer], [lead], probabilities[None], most)


def ranked_each(
    layers: Sequence[int], leads: Sequence[int], probabilities: NDArray[Any], most: int
) -> list[Prediction]:
    """The same of several layers, [layers, E], each so far ahead; all at once, since calls cost more than numbers."""
    order = (-probabilities).argsort(axis=1, kind="stable")[:, :most]
    chances = probabilities[np.arange(len(order))[:, None], order]
    found: list[Prediction] = []
    for layer, lead, experts, row in zip(layers, leads, order.tolist(), chances.tolist(), strict=True):
        likely = row if all(row[-1:]) else row[: row.index(0)]
        keys = keys_of(layer, probabilities.shape[1])
        found += made([keys[expert] for expert in experts[: len(likely)]], likely, lead)
    return found


def predicted(layer: int, lead: int, experts: NDArray[np.int64], probabilities: NDArray[Any]) -> Iterator[Prediction]:
    """Predictions of `experts`, likeliest first, from the probabilities of all of a layer's, [E]."""
    keys = keys_of(layer, len(probabilities))
    return made([keys[expert] for expert in experts.tolist()], probabilities[experts].tolist(), lead)


_of_fields = partial(tuple.__new__, Prediction)


def made(keys: Sequence[ExpertKey], probabilities: Sequence[float], lead: int) -> Iterator[Prediction]:
    """Predictions of these fields, past their constructor, which takes three times as long as making a tuple."""
    return map(_of_fields, zip(keys, probabilities, repeat(lead)))  # a lead has no end


def ranked_ahead(
    event: RoutingEvent,
    tokens: int,
    depth: int,
    num_layers: int,
    shares_of: Callable[[Sequence[int]], NDArray[Any]],
    most: int | None = None,
) -> list[Prediction]:
    """What `shares_of(layers)` [layers, E], a single token's need, says of the `depth` layers after `event`, which has
    so many tokens: up to `most` experts each, by default twice as many as the event needed."""
    leads = range(1, min(depth, num_layers) + 1)
    layers = layers_ahead(event.layer, num_layers)[: len(leads)]
    needed = needed_ahead(event, tokens, leads, num_layers, shares_of(layers))
    return ranked_each(layers, leads, needed, most or 2 * len(event.experts))


def needed_ahead(
    event: RoutingEvent, tokens: int, leads: Sequence[int], num_layers: int, shares: NDArray[Any]
) -> NDArray[Any]:
    """The probability that the layers so far after `event` need each expert, [layers, E], from a single token's need;
    `leads` ascend."""
    if tokens == 1:
        return shares
    counts = [tokens_ahead(event, tokens, lead, num_layers) for lead in leads]
    same = counts.count(tokens)  # those of the next pass come last
    needed: NDArray[Any] = shares.copy()
    needed[:same] = of_any_token(shares[:same], tokens)
    return needed


@cache
def layers_ahead(layer: int, num_layers: int) -> list[int]:
    """The layers after `layer` until it comes again, in the order in which they run."""
    return [(layer + lead) % num_layers for lead in range(1, num_layers + 1)]


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


def ranked_in_pass(event: RoutingEvent, depth: int, needs: NDArray[Any]) -> list[Prediction]:
    """What `needs` [L, E] says of the `depth` layers after `event`, as far as its pass goes: twice as many experts each
    as will be needed."""
    found: list[Prediction] = []
    for layer in range(event.layer + 1, min(event.layer + 1 + depth, len(needs))):
        found += ranked(layer, layer - event.layer, needs[layer], 2 * expected_of(needs[layer]))
    return found


def of_any_token(probabilities: NDArray[Any], tokens: int) -> NDArray[Any]:
    """The probability that one of several independent tokens needs an expert, from that of a single token's need."""
    return probabilities if tokens == 1 else 1 - (1 - probabilities) ** tokens
