"""Which experts followed which: counted paths through the layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.trace import Trace
from cache.types import RoutingEvent
from predictors.base import Prediction, Predictor, register
from predictors.ranking import Tokens, check_size, layers_ahead, needed_ahead, ranked_each

_PRIOR = 4.0  # what is known without a key counts as that many observations of it
_TRUST = 0.7  # how much of each key's evidence counts: the experts of a layer go together, and say much the same


@dataclass(frozen=True)
class TransitionParams:
    """`order`: go by the experts of this layer (1), or of this and the one before (2). `reach`: how far ahead."""

    order: int = 1
    reach: int = 3

    def __post_init__(self) -> None:
        if self.order not in (1, 2) or self.reach < 1:
            raise ValueError(f"order is {self.order}, 1 or 2 can be; reach is {self.reach}, at least 1")


class _Counts:
    """What followed each key (an expert, or a pair of them): a row for each distance, target layer and key."""

    def __init__(self, reach: int, num_layers: int, keys: int, num_experts: int) -> None:
        self._layers, self._keys = num_layers, keys
        self._followed = np.zeros((reach * num_layers * keys, num_experts), np.float32)
        self._seen = np.zeros(len(self._followed), np.float32)

    def copy(self) -> _Counts:
        return deepcopy(self)

    def first(self, distance: int, layer: int) -> int:
        """The row of key 0."""
        return ((distance - 1) * self._layers + layer) * self._keys

    def add(self, rows: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """One token went to `experts`, after what `rows` stand for."""
        self._followed.reshape(-1)[rows[:, None] * self._followed.shape[1] + experts] += 1
        self._seen[rows] += 1

    def add_all(self, rows: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """The same of many tokens, [T, keys] and [T, experts]."""
        np.add.at(self._followed, (rows[:, :, None], experts[:, None]), 1)
        np.add.at(self._seen, rows, 1)

    def rates(self, rows: NDArray[np.int64], prior: NDArray[Any]) -> NDArray[np.float32]:
        """How often each expert followed, [.., E] for rows [..]; `prior` is what is known without them."""
        rates: NDArray[np.float32] = self._followed.take(rows, axis=0)
        rates += _PRIOR * prior
        rates /= (self._seen.take(rows) + _PRIOR)[..., None]
        return rates


@register
class Transition(Predictor):
    """P(expert at layer l + d | expert at layer l), counted; each of a layer's experts gives evidence of its own.

    Their log-likelihood ratios against the target layer's popularity are added, each at 0.7 of its size. Every
    distance up to `reach` has a table of its own, across the end of a pass as well, and nothing is said beyond.
    `order=2` goes by pairs, an expert of this layer and one of the layer before, and by the single one where a pair is
    rare. Counted are tokens that were alone in their passes, and all tokens of a profile.

    Tables take 4 reach L E^2 bytes, 9 MB for 48 layers of 128 experts; with `order=2` E times that on top.
    Sources: Yao et al., ExFlow, arXiv 2401.08383; for `order=2` Yi et al., EdgeMoE, 2308.14352. Their models use one or
    two experts a layer: how the evidence of more is combined is this project's choice.
    """

    name = "transition"
    Params = TransitionParams
    _trained: tuple[list[_Counts], NDArray[np.float32], float] | None = None

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        chosen = TransitionParams() if params is None else params
        self._reach = min(chosen.reach, num_layers)
        size = 4 * self._reach * num_layers * num_experts ** (chosen.order + 1)
        check_size(self.name, size, f"lower order, now {chosen.order}, or reach, now {chosen.reach}")
        super().__init__(num_layers, num_experts, chosen)

    def learn(self, profile: Trace) -> None:
        self.reset()
        new = np.zeros(profile.num_tokens, np.bool_)
        new[profile.sequence_offsets[:-1]] = True
        for layer in range(self.num_layers):
            experts = profile.experts[:, layer].astype(np.int64)
            self._uses[layer] += np.bincount(experts.ravel(), minlength=self.num_experts)
            for distance in range(1, self._reach + 1):
                here, before = (_counted_back(profile, new, layer - distance - back) for back in (0, 1))
                keys = self._keys(here, before)
                for counts, of_order, origin in zip(self._counts, keys, (here, before), strict=False):
                    known = origin[:, 0] >= 0  # and with the layer before all those after it
                    counts.add_all(of_order[known] + counts.first(distance, layer), experts[known])
        self._trained = self._counts, self._uses, profile.num_tokens

    def reset(self) -> None:
        super().reset()
        layers, experts = self.num_layers, self.num_experts
        # By single experts, then by pairs.
        if self._trained is None:
            orders = range(1, self.params.order + 1)
            self._counts = [_Counts(self._reach, layers, experts**order, experts) for order in orders]
            self._uses, seen = np.zeros((layers, experts), np.float32), 0.0
        else:
            self._counts = [counts.copy() for counts in self._trained[0]]
            self._uses, seen = self._trained[1].copy(), self._trained[2]
        self._seen = np.full(layers, seen)
        self._tokens = Tokens()
        self._event: RoutingEvent | None = None
        self._count = 1
        # Of the latest layers, the last one first: keys of each order, or none where several tokens passed.
        self._history: deque[list[NDArray[np.int64]]] = deque(maxlen=self._reach)
        self._before: NDArray[np.int64] | None = None

    def observe(self, event: RoutingEvent) -> None:
        last = self._event
        if last is None or last.sequence != event.sequence or (last.layer + 1) % self.num_layers != event.layer:
            self._history.clear()
            self._before = None
        self._event = event
        self._count = self._tokens.of(event)
        experts = np.array(event.experts, np.int64)
        self._uses[event.layer, experts] += np.array(event.tokens, np.float32)
        self._seen[event.layer] += self._count
        if self._count == 1:
            for order, counts in enumerate(self._counts):
                # Of each of the latest layers that has such keys, all at once: calls cost more than numbers.
                known = [
                    keys[order] + counts.first(distance, event.layer)
                    for distance, keys in enumerate(self._history, 1)
                    if order < len(keys)
                ]
                if known:
                    counts.add(np.concatenate(known), experts)
            before = np.zeros(0, np.int64) if self._before is None else self._before
            self._history.appendleft([keys[0] for keys in self._keys(experts[None], before[None])])
        else:
            self._history.appendleft([])
        self._before = experts if self._count == 1 else None

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        leads = range(1, min(depth, self._reach) + 1)
        layers = layers_ahead(event.layer, self.num_layers)[: len(leads)]
        needed = needed_ahead(event, self._count, leads, self.num_layers, self._needs(event, layers))
        return ranked_each(layers, leads, needed, 2 * len(event.experts))

    def _needs(self, event: RoutingEvent, layers: Sequence[int]) -> NDArray[np.float32]:
        """The probability that one token needs each expert of the `layers` after `event`, [layers, E]."""
        experts = np.array(event.experts, np.int64)
        share = np.float32(self._tokens.share(self.num_experts))
        popular = (self._uses[layers] + share) / (self._seen[layers] + 1).astype(np.float32)[:, None]
        np.minimum(popular, np.float32(1 - 1e-6), out=popular)
        firsts = [np.array([[c.first(n, layer)] for n, layer in enumerate(layers, 1)]) for c in self._counts]
        rates = self._counts[0].rates(firsts[0] + experts, popular[:, None])
        known = np.log(popular)
        evidence = np.log(rates) - known[:, None]
        pairs = self._history[0][1:]
        if pairs and len(pairs[0]):
            prior = np.tile(rates, (1, len(pairs[0]) // len(experts), 1))
            of_pairs = self._counts[1].rates(firsts[1] + pairs[0], prior)
            each = np.log(of_pairs).reshape(len(layers), -1, *rates.shape[1:])
            evidence = each.mean(axis=1) - known[:, None]
        if self._count > 1:
            evidence *= np.array(event.tokens, np.float32)[:, None] / np.float32(self._count)
        odds = known - np.log1p(-popular) + np.float32(_TRUST) * np.add.reduce(evidence, axis=1)
        needs: NDArray[np.float32] = 1 / (1 + np.exp(-np.maximum(odds, -80)))
        return needs

    def _keys(self, here: NDArray[np.int64], before: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The keys of each order that tokens' experts are, [T, K] of the layer and the one before -> [T, keys]."""
        if self.params.order == 1:
            return [here]
        return [here, (before[:, :, None] * self.num_experts + here[:, None]).reshape(len(here), -1)]


def _counted_back(trace: Trace, new: NDArray[np.bool_], layer: int) -> NDArray[np.int64]:
    """Each token's experts at `layer`, or of as many tokens before as it is below 0; -1 where its sequence has none.

    `new` says where sequences begin.
    """
    experts = trace.experts[:, layer % trace.num_layers].astype(np.int64)
    for _ in range(-(layer // trace.num_layers)):
        experts = np.roll(experts, 1, axis=0)
        experts[new] = -1
    return experts
