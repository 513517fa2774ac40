"""Ours: a linear forecast of the next use, from what this layer and all others routed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cache.counting.schedule import Chunk, Schedule
from cache.lanes import Ints, Lanes, Touch
from cache.policies.recall import Recall, passes_to_go
from cache.policy import EvictionPolicy, register
from cache.traces.profiles import evenly
from cache.traces.trace import Trace

_ROWS = 1024
"""Events of a layer whose features are in memory at a time while training."""
_GRAM_BYTES = 2**28
"""Bytes of the layers' Gram matrices that are summed up at a time: what is more takes another walk over the profile."""
_DIGITS = 6
"""Forecasts are rounded, so that the order of adding up, which differs between replays, cannot decide."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RidgeParams:
    """`rates` are those at which counts of uses and of weights fade, a pass; `horizon` is how many passes ahead a use
    still counts 1/e; `penalty` is that of the ridge regression; `features` are the most it may have, those of other
    layers filling up what the layer's own leave, the nearest first; `passes` the most that are trained on. `recall`
    is the weight of the `recall` policy's value beside the forecast. `bypass`: a fetched expert is kept only if it
    outranks
    what would have to go."""

    rates: tuple[float, ...] = (1.0, 0.4, 0.1, 0.02)
    horizon: float = 5.0
    penalty: float = 300.0
    features: int = 2048
    passes: int = 32768
    recall: float = 0.5
    bypass: bool = False


@register
class Ridge(EvictionPolicy):
    """Evict the expert with the lowest forecast of exp(-(passes until its next use - 1) / horizon).

    A ridge regression for each layer, trained on a profile. It sees how often and how heavily all of the layer's
    experts were used, at several rates of forgetting, and what every other layer routed last: those before it in this
    very pass, those behind it in the pass before. To that comes what `recall` expects, which knows this run rather
    than the model.

    Source: this project; docs/policies.md has the figures.
    """

    name = "ridge"
    Params = RidgeParams
    learns = True

    def reset(self) -> None:
        super().reset()
        self.bypass = self.params.bypass
        self._features = _Features(self.lanes, self.params)
        self._recall = Recall(self.lanes) if self.params.recall else None
        self._forecast = self.zeros()
        self._layer = 0
        self._nearness = np.exp(-passes_to_go(self.lanes) / self.params.horizon)

    def learn(self, profile: Trace) -> None:
        self._weights = _train(profile, self.params)

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        self._layer = touch.columns.start // self.lanes.experts
        if self._recall is not None:
            self._recall.touch(touch)
        for layer, rows, seen in self._features.update(touch):
            forecast = seen @ self._weights[layer]
            if self._recall is not None:
                forecast += self.params.recall * self._recall.values(rows)[:, touch.columns]
            self._forecast[rows, touch.columns] = forecast.round(_DIGITS)

    def priorities(self, lanes: slice) -> Array:
        worth: Array = self._forecast[lanes] * self._nearness[self._layer]
        return worth


class _Features:
    """What the regressions see, kept up to date event by event, for every copy of the model in `lanes`."""

    def __init__(self, lanes: Lanes, params: RidgeParams) -> None:
        self._experts = lanes.experts
        self._lanes_each = lanes.num_layers // lanes.layers
        self.near = _near(lanes.num_layers, lanes.experts, params)
        rates = np.array(params.rates)
        self._keep = np.repeat(1 - rates, 2)[:, None, None]
        # As large as each other, so that one penalty suits all.
        self._gains = np.sqrt(rates)[:, None, None]
        self._faded = np.zeros((2 * len(rates), lanes.count, lanes.width))
        self._last = np.zeros((lanes.count // self._lanes_each, lanes.num_layers, lanes.experts))

    def update(self, touch: Touch) -> list[tuple[int, slice, Array]]:
        """Take note of an event; then, for each layer it is of: the layer, the lanes, their features [n, features].

        First the faded counts of uses and of shares of the weight, of the layer's own experts; then the last shares
        of the layers that are `near`; at last a one.
        """
        shares = touch.shares()
        num_lanes, each = len(shares), self._lanes_each
        gains = np.empty((len(self._faded), *shares.shape))
        gains[0::2] = self._gains
        gains[1::2] = 3 * self._gains * shares
        block = self._faded[:, touch.lanes, touch.columns]
        block *= self._keep
        self._faded.reshape(len(self._faded), -1)[:, touch.at] += gains
        routed = np.zeros((num_lanes, self._experts))
        routed[np.arange(num_lanes)[:, None], touch.experts] = shares
        if each == 1 or num_lanes < each:  # one layer: of every copy that has one lane, or of the only copy
            layer = touch.columns.start // self._experts if each == 1 else touch.lanes.start
            self._last[:num_lanes, layer] = routed
            return [(layer, touch.lanes, self._join(block, self._last[:num_lanes, self.near[layer]]))]
        before = self._last[: num_lanes // each].copy()
        after = self._last[: num_lanes // each]
        after[:] = routed.reshape(before.shape)
        found = []
        for layer in range(each):
            rows = slice(layer, num_lanes, each)
            last = np.concatenate([after[:, :layer], before[:, layer:]], axis=1)
            found.append((layer, rows, self._join(block[:, rows], last[:, self.near[layer]])))
        return found

    @staticmethod
    def _join(own: Array, others: Array) -> Array:
        count = own.shape[1]
        return np.concatenate(
            [own.swapaxes(0, 1).reshape(count, -1), others.reshape(count, -1), np.ones((count, 1))], axis=1
        )


def _near(num_layers: int, num_experts: int, params: RidgeParams) -> list[Ints]:
    """The other layers that each layer's regression sees, ascending."""
    room = params.features - 1 - 2 * len(params.rates) * num_experts
    count = min(max(room // num_experts, 0), num_layers - 1)
    layers = np.arange(num_layers)
    return [np.sort(np.argsort(abs(layers - layer), kind="stable")[1 : count + 1]) for layer in layers]


@lru_cache(maxsize=2)
def _train(profile: Trace, params: RidgeParams) -> list[Array]:
    """The weights of each layer's regression, [features, E]."""
    if profile.num_tokens > params.passes:
        most = max(profile.num_sequences * params.passes // profile.num_tokens, 1)
        profile = profile.select(evenly(profile.num_sequences, most).tolist())
    size = 2 * len(params.rates) * profile.num_experts + 1
    size += len(_near(profile.num_layers, profile.num_experts, params)[0]) * profile.num_experts
    group = max(_GRAM_BYTES // (8 * size**2), 1)
    weights = []
    for first in range(0, profile.num_layers, group):
        layers = range(first, min(first + group, profile.num_layers))
        sums = {layer: _Sums(size, profile.num_experts) for layer in layers}
        for chunk in Schedule(profile, pool="layer", cold=True).chunks():
            _add_examples(chunk, profile, params, sums)
        weights += [sums[layer].solve(params.penalty) for layer in layers]
    return weights


class _Sums:
    """The normal equations of one regression, summed up over examples."""

    def __init__(self, size: int, num_experts: int) -> None:
        self._gram = np.zeros((size, size))
        self._right = np.zeros((size, num_experts))
        self._rows: list[tuple[Array, NDArray[np.float32]]] = []
        self._count = 0

    def add(self, features: Array, targets: NDArray[np.float32]) -> None:
        """Examples [n, features] and what they should give, [n, E]."""
        self._rows.append((features, targets))
        self._count += len(features)
        if self._count >= _ROWS:
            self._sum()

    def solve(self, penalty: float) -> Array:
        """[features, E]."""
        self._sum()
        return np.linalg.solve(self._gram + penalty * np.eye(len(self._gram)), self._right).astype(np.float64)

    def _sum(self) -> None:
        if self._rows:
            # Single precision is twice as fast, and the penalty dwarfs what it loses.
            features, targets = (np.concatenate(part).astype(np.float32) for part in zip(*self._rows, strict=True))
            self._gram += features.T @ features
            self._right += features.T @ targets
        self._rows, self._count = [], 0


def _add_examples(chunk: Chunk, profile: Trace, params: RidgeParams, sums: dict[int, _Sums]) -> None:
    num_layers, num_experts = profile.num_layers, profile.num_experts
    lanes = Lanes(num_layers, 1, num_experts, np.zeros(chunk.units * num_layers, np.int64))
    targets = _targets(chunk, lanes, params.horizon)
    features = _Features(lanes, params)
    for touch, target in zip(chunk.touches(), targets, strict=True):
        for layer, rows, seen in features.update(touch):
            if layer in sums:
                sums[layer].add(seen, target[rows])


def _targets(chunk: Chunk, lanes: Lanes, horizon: float) -> list[NDArray[np.float32]]:
    """Of every event: exp(-(passes until the next use - 1) / horizon) of each expert, float32 [N, E]."""
    targets = []
    passes = np.full((lanes.count, lanes.width), np.inf)
    for time in reversed(range(chunk.times)):
        at = chunk.at(time)
        running = passes[: len(at)]
        targets.append(np.exp((1 - running) / horizon).astype(np.float32))
        running += 1
        passes.reshape(-1)[at] = 1
    return targets[::-1]
