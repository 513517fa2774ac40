"""How a prompt is read: what of it stays in the caches, and what the next layer needs before its routing is known.

A prompt's pass goes through the layers once, and needs most experts of each; the next chunk goes through them again. A
policy that goes by recency holds on to what such a scan came by last, which is what it will need last. So while a
prompt is read, caches keep the experts that most of its tokens have gone to, of all layers alike: later chunks find
them, and so does the reply. The others pass through the places at the bottom of that order. In those the next layer's
experts arrive while this one computes: whole layers are streamed, inside the caches' own bytes. Torch-free, part of the
decision loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache.residency import ExpertCache
from cache.types import ExpertKey, Phase, RoutingEvent
from predictors.base import Prediction

PREFILLS = ("streamed", "kept", "on-demand")
"""Keep the prompt's most frequent experts and fetch ahead; only keep them; neither, the policy decides as always."""


class Prefill:
    """Counts a prompt's tokens by expert, ranks every cache by them, and, if it `streams`, says what comes next.

    Frequencies are shares of a layer's tokens, so that a layer that has seen this chunk already and one that has not
    compare. A layer that a prompt has not reached yet has those of the prompt before. From the first token of the reply
    on the policy alone decides.
    """

    def __init__(self, num_layers: int, num_experts: int, *, streams: bool = True) -> None:
        self.streams = streams
        self._shape = num_layers, num_experts
        self._tokens = np.zeros(self._shape, np.int64)
        self._shares = np.zeros(self._shape)
        self._reached: set[int] = set()
        self._sequence: int | None = None
        self._reading = False

    def observe(self, event: RoutingEvent, caches: Sequence[ExpertCache]) -> None:
        """An event has come. Side effect: `caches` go by frequency while it is a prompt's, by their policy again after.

        Called before anything is evicted for the event.
        """
        if event.phase is Phase.DECODE:
            if self._reading:
                self._reading = False
                for cache in caches:
                    cache.rank(None)
            return
        if event.sequence != self._sequence:
            self._sequence = event.sequence
            self._reached.clear()
        layer = event.layer
        if layer not in self._reached:
            self._reached.add(layer)
            self._tokens[layer] = 0
        self._tokens[layer, list(event.experts)] += np.array(event.tokens, np.int64)
        self._shares[layer] = self._tokens[layer] / max(self._tokens[layer].sum(), 1)
        self._reading = True
        for cache in caches:
            cache.rank(self._shares)

    def ahead(self, event: RoutingEvent) -> list[Prediction]:
        """What the next layer of a prompt's pass needs, more likely than not: the most frequent first.

        How likely: tokens that went to an expert of that layer in earlier chunks go on doing so at random; in the
        first chunk, a layer uses as many of its experts as this one. Nothing is expected after the last layer, since
        nobody knows whether another chunk follows.
        """
        num_layers, num_experts = self._shape
        layer = event.layer + 1
        if event.phase is not Phase.PREFILL or layer == num_layers:
            return []
        shares = self._shares[layer]
        if layer in self._reached:
            needed = 1 - np.exp(-shares * sum(event.tokens))
        else:
            needed = np.full(num_experts, len(event.experts) / num_experts)
        order = np.argsort(-shares, kind="stable")
        return [Prediction(ExpertKey(layer, int(e)), float(needed[e]), 1) for e in order if needed[e] > 0.5]

    def reset(self, caches: Sequence[ExpertCache]) -> None:
        """Forget every prompt, as a cold start does. Side effect: `caches` go by their policy."""
        self._tokens[:] = 0
        self._shares[:] = 0.0
        self._reached.clear()
        self._sequence = None
        self._reading = False
        for cache in caches:
            cache.rank(None)
