"""Trains what `predictors.learned` predicts with, and says how well it does on sequences that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.ahead import rank_ahead
from cache.traces.passes import batches, running_order
from cache.traces.trace import Trace
from predictors.forecast import GAINS, POINTS, RATES, Array, Regressions, named, num_features

_PENALTY = 100.0  # of the ridge regression
_ROWS = 4096  # passes whose features are in memory at a time
_COLUMNS = 16  # layers of which everything is kept at hand


class Comparison(NamedTuple):
    """Of the experts that single tokens used `distance` layers ahead, the share among the first K and 2K named."""

    distance: int
    frequency: tuple[float, float]
    """By those used most in training."""
    recent: tuple[float, float]
    """By those used most lately, their counts fading at the slowest of `RATES`."""
    learned: tuple[float, float]


class Passes:
    """A trace as P forward passes in running order: what each layer did in them, and what was known before."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._pass = np.empty(trace.num_tokens, np.int64)
        self.group: NDArray[np.int64]
        """[P]: which sequence, or batch of them, a pass belongs to."""
        groups, count = [], 0
        for number, sequences in enumerate(batches(trace, np.arange(trace.num_sequences))):
            tokens, starts = running_order(trace, sequences)
            self._pass[tokens] = count + np.searchsorted(starts, np.arange(len(tokens)), "right") - 1
            groups.append(np.full(len(starts), number))
            count += len(starts)
        self.group = np.concatenate(groups)
        self.tokens = np.bincount(self._pass)
        self.shares: Callable[[int], Array] = lru_cache(_COLUMNS)(self._shares)
        self.faded: Callable[[int], Array] = lru_cache(_COLUMNS)(self._faded)

    def _shares(self, layer: int) -> Array:
        """[P, E]: the share of its tokens that the layer gave to each expert."""
        experts = self.trace.num_experts
        cells = self._pass[:, None] * experts + self.trace.experts[:, layer]
        counts = np.bincount(cells.ravel(), minlength=len(self.tokens) * experts).reshape(-1, experts)
        return (counts / self.tokens[:, None]).astype(np.float32)

    def _faded(self, layer: int) -> Array:
        """[P, R * E]: its fading counts after each pass."""
        shares = self.shares(layer)
        keep, gains = 1 - np.array(RATES, np.float32)[:, None], GAINS[:, None]
        faded = np.empty((len(shares), len(RATES), shares.shape[1]), np.float32)
        now = np.zeros(faded.shape[1:], np.float32)
        for index, share in enumerate(shares):
            now *= keep
            now += gains * share
            faded[index] = now
        return faded.reshape(len(shares), -1)

    def ahead(self, layer: int, distance: int) -> Array:
        """[P, 2 E]: what the gate said; see `named`."""
        predicted, experts = self.trace.predicted, self.trace.num_experts
        found = np.zeros((len(self.tokens), 2 * experts), np.float32)
        if predicted is None or layer + distance >= self.trace.num_layers or distance > predicted.shape[2]:
            return found
        order = np.argsort(self._pass, kind="stable")
        for index, rows in enumerate(np.split(order, np.cumsum(self.tokens)[:-1])):
            said = rank_ahead(predicted[rows, layer, :distance])
            found[index] = named(said, distance, experts, self.trace.top_k)
        return found

    def examples(
        self, layer: int, distance: int, window: int, rows: NDArray[np.bool_]
    ) -> Iterator[tuple[Array, Array]]:
        """Blocks of features [N, F], after `layer`, and shares [N, E], `distance` layers later, of the passes `rows`.

        As `State` has them while the model runs. The last pass of a sequence has nothing after it.
        """
        trace = self.trace
        asked, wraps = (layer + distance) % trace.num_layers, layer + distance >= trace.num_layers
        recent = [(layer - back) % trace.num_layers for back in range(window)]
        chosen = np.flatnonzero(rows & (np.append(self.group[1:], -1) == self.group) if wraps else rows)
        ahead = self.ahead(layer, distance) if trace.predicted is not None else None
        for start in range(0, len(chosen), _ROWS):
            now = chosen[start : start + _ROWS]
            parts = [_at(self.shares(other), now if other <= layer else now - 1) for other in recent]
            parts += [_at(array(asked), now if wraps else now - 1) for array in (self.shares, self.faded)]
            parts += [] if ahead is None else [ahead[now]]
            yield np.hstack([*parts, np.ones((len(now), 1), np.float32)]), self.shares(asked)[now + wraps]


def fit(
    traces: Sequence[Trace], *, depth: int = 3, window: int = 6, hold_out: int = 0
) -> tuple[Regressions, list[Comparison]]:
    """What `traces` say of a model, up to `depth` layers ahead of the last `window`, and how well.

    Every `hold_out`-th sequence or batch, if any, is not learned from and compared on. What gates said ahead is used
    if all traces have it. Raises TraceError for traces of different models, and if nothing is left to compare on.
    """
    ahead = all(trace.predicted is not None for trace in traces)
    first = _of_one_model(traces)
    layers, experts, top_k = first.num_layers, first.num_experts, first.top_k
    depth, window = min(depth, layers), min(window, layers)
    seen = [Passes(trace if ahead else replace(trace, predicted=None)) for trace in traces]
    held = [passes.group % hold_out == hold_out - 1 if hold_out else passes.group < 0 for passes in seen]
    single = [(rows | (not hold_out)) & (passes.tokens == 1) for rows, passes in zip(held, seen, strict=True)]
    if hold_out and not any(rows.any() for rows in single):
        raise TraceError(f"{first.name} has no sequence left to compare on: record more than {hold_out}")
    weights = np.empty((layers, depth, num_features(experts, window, ahead), experts), np.float16)
    found, used, outcomes = np.zeros((depth, 3, 2)), np.zeros(depth), np.zeros((depth, 2, len(POINTS)))
    fading = (window + len(RATES)) * experts  # where the counts that fade slowest are
    for layer, distance in product(range(layers), range(1, depth + 1)):
        asked = (layer, distance, window)
        learned, mean = _ridge(
            weights.shape[2:],
            (block for passes, rows in zip(seen, held, strict=True) for block in passes.examples(*asked, ~rows)),
        )
        weights[layer, distance - 1] = learned
        for passes, rows in zip(seen, single, strict=True):
            for features, uses in passes.examples(*asked, rows):
                recent = features[:, fading : fading + experts]
                guesses = (np.broadcast_to(mean, uses.shape), recent, features @ learned)
                found[distance - 1] += [[_found(guess, uses, n * top_k) for n in (1, 2)] for guess in guesses]
                used[distance - 1] += uses.sum()
                outcomes[distance - 1] += _outcomes(guesses[-1], uses)
    rates = (found / np.maximum(used, 1)[:, None, None]).tolist()
    compared = [Comparison(i, *((first_k, all_2k) for first_k, all_2k in three)) for i, three in enumerate(rates, 1)]
    curves = np.stack([_curve(*outcome) for outcome in outcomes])
    return Regressions(weights, curves, window, top_k, ahead, first.model), compared if hold_out else []


def _of_one_model(traces: Sequence[Trace]) -> Trace:
    first, *others = traces
    for other in others:
        for what in ("model", "num_layers", "num_experts", "top_k"):
            if getattr(first, what) != getattr(other, what):
                said = f"{what} is {getattr(first, what)} and {getattr(other, what)}"
                raise TraceError(f"{first.name} and {other.name} do not belong together: {said}")
    return first


def _ridge(shape: tuple[int, ...], examples: Iterator[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The weights [F, E] of the regression, and the mean [E] of what is to be explained; zeros without examples."""
    gram, moments = np.zeros((shape[0], shape[0])), np.zeros(shape)
    for features, uses in examples:
        gram += features.T @ features
        moments += features.T @ uses
    penalty = np.full(len(gram), _PENALTY)
    penalty[-1] = 1e-6  # what stands alone is not held back, but may be all there is
    solved = np.linalg.solve(gram + np.diag(penalty), moments)
    return solved.astype(np.float32), (moments[-1] / max(gram[-1, -1], 1)).astype(np.float32)


def _found(guess: Array, uses: Array, count: int) -> float:
    """How many of the experts that were used are among the `count` first."""
    count = min(count, guess.shape[1])
    first = np.argsort(-guess, axis=-1, kind="stable")[:, :count]
    return float(np.take_along_axis(uses, first, -1).sum())


def _outcomes(share: Array, uses: Array) -> NDArray[np.float64]:
    """[2, 41]: how many forecasts were nearest to each of `POINTS`, and how many of them came true."""
    nearest = np.rint(share.clip(0, 1) * (len(POINTS) - 1)).astype(np.int64).ravel()
    return np.stack([np.bincount(nearest, weights, len(POINTS)) for weights in (None, uses.ravel())])


def _curve(forecasts: NDArray[np.float64], uses: NDArray[np.float64]) -> Array:
    """The share that came true, at each point; never falling. Four more that kept their word stand in for none."""
    prior = 4.0
    true = (uses + prior * POINTS) / (forecasts + prior)
    return np.maximum.accumulate(true).astype(np.float32)


def _at(array: Array, rows: NDArray[np.int64]) -> Array:
    """The rows; zeros before the first."""
    taken = array[np.maximum(rows, 0)]
    taken[rows < 0] = 0
    return taken
