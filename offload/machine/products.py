"""Times of products by rows, as many as fit the time: what plans use most is measured first, the rest estimated.

One row is what decoding computes; then comes the most rows that fit, as a long prompt has; then what is between them.
Time never rises faster than the rows do, so a time for fewer rows says how long more rows take at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from offload.costs.machine import ProductCurve
from offload.device.base import Device
from offload.machine.budget import Budget
from offload.machine.threads import torch_threads
from offload.system.timing import rising

_POINT_S = 0.05
_ONE_ROW_S = 0.1  # what every token that is decoded depends on
_ALIKE = 16  # a matrix so many times as large has the same bounds: memory for few rows, arithmetic for many


@dataclass(frozen=True)
class Product:
    """What can be timed: `call` computes it once, for some tokens, with weights that take so many bytes."""

    format: str
    shape: tuple[int, int]
    weight_bytes: int
    threads: int
    tokens: Sequence[int]
    call: Callable[[int], object]
    device: Device


@dataclass
class Times:
    """What a product was measured to take, by tokens."""

    product: Product
    seconds: dict[int, float] = field(default_factory=dict)

    def take(self, tokens: int, budget: Budget) -> float:
        """The time for so many tokens, as it is now."""
        with torch_threads(self.product.threads), self.product.device.computing():
            if not self.seconds:
                self.product.call(tokens)  # a format's first product may import what computes it
            most_s = _ONE_ROW_S if tokens == 1 else _POINT_S
            return budget.median_s(partial(self.product.call, tokens), most_s, self.at_most_s(tokens))

    def next(self, budget: Budget) -> int | None:
        """The count of tokens that is worth the most of those not measured yet that fit; None if none does."""
        first, *rest = self.product.tokens
        wanted = (n for n in (first, *sorted(rest, reverse=True)) if n not in self.seconds)
        return next((n for n in wanted if budget.fits(self.at_most_s(n))), None)

    def at_most_s(self, tokens: int) -> float:
        """How long a run takes at most, as far as measurements say; 0 before there are any."""
        above = [seconds for n, seconds in self.seconds.items() if n >= tokens]
        below = [seconds * tokens / n for n, seconds in self.seconds.items() if n < tokens]
        return min(above + below, default=0.0)


def measure_products(times: Sequence[Times], budget: Budget) -> None:
    """Measures products in turns, a count of tokens each time, until all is measured or nothing fits any more.

    What is measured is in `times` at once, so that it is there when this is interrupted.
    """
    for _ in range(max(len(each.product.tokens) for each in times)):
        for each in times:
            tokens = each.next(budget)
            if tokens is not None and budget.left_s > 0:
                each.seconds[tokens] = each.take(tokens, budget)


def curves(times: Sequence[Times], least: int = 1) -> tuple[ProductCurve, ...]:
    """What was measured, with estimates for more tokens than were, of products known by at least so many counts of
    tokens, or by all there are."""
    known: list[Times] = []
    for each in sorted(times, key=lambda each: -len(each.seconds)):  # what is known best says what the others take
        if each.seconds:
            known.append(Times(each.product, _with_estimates(each, known)))
    found = []
    for each, filled in ((each, filled) for each in times for filled in known if filled.product is each.product):
        product = each.product
        if len(filled.seconds) < min(len(product.tokens), least):
            continue
        found.append(
            ProductCurve(
                product.format,
                product.shape,
                product.weight_bytes,
                product.threads,
                rising(filled.seconds),
                extrapolated=tuple(sorted(filled.seconds.keys() - each.seconds.keys())),
            )
        )
    return tuple(found)


def _with_estimates(times: Times, others: Sequence[Times]) -> dict[int, float]:
    """Its times, and those of more tokens than were measured, as far as anything says them; between measured ones a
    curve needs none."""
    known = dict(times.seconds)
    for tokens in sorted(times.product.tokens):
        if tokens > max(known):
            seconds = _estimate(times, known, tokens, others)
            if seconds is not None:
                known[tokens] = seconds
    return known


def _estimate(times: Times, known: Mapping[int, float], tokens: int, others: Sequence[Times]) -> float | None:
    """By a matrix of the same format that is about as large. Else linear from the last two counts of tokens, or as
    another format's time rises, whose arithmetic is the same: the larger, as a few tokens may take no time of their
    own. None where nothing is known."""
    own, measured, last = times.product, max(times.seconds), max(known)
    alike = [
        each
        for each in others
        if {measured, last, tokens} <= each.seconds.keys()
        and each.product.threads == own.threads
        and 1 / _ALIKE <= each.product.weight_bytes / own.weight_bytes <= _ALIKE
    ]
    same = [each for each in alike if each.product.format == own.format]
    if same:
        nearest = min(same, key=lambda each: abs(each.product.weight_bytes - own.weight_bytes))
        return known[measured] * max(nearest.seconds[tokens] / nearest.seconds[measured], 1.0)
    rises = [each.seconds[tokens] - each.seconds[last] for each in alike if each.product.shape == own.shape]
    if len(known) > 1:
        before = max(n for n in known if n < last)
        slope = min((known[last] - known[before]) / (last - before), known[last] / last)
        rises.append((tokens - last) * slope)
    return known[last] + max(*rises, 0.0) if rises else None
