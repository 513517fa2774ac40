"""The whole path of a pass through the experts, said before its first layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import RoutingEvent, before_first
from predictors.base import Prediction, Predictor, register
from predictors.ranking import Tokens, check_size, of_any_token, ranked_in_pass


@dataclass(frozen=True)
class PathParams:
    """`rate`: how much a single event changes."""

    rate: float = 1.6

    def __post_init__(self) -> None:
        if not 0 < self.rate < 8:
            raise ValueError(f"rate {self.rate}: 0 to 8")


@register
class Path(Predictor):
    """A logistic regression for each layer on what the pass reads and on what the layer used a pass before.

    ExpertFlow has a small transformer that sees the tokens of a batch and says the experts of all layers at once. Ours
    sees the mean embedding of the tokens, where somebody says what a pass reads, and is fitted while it runs; a profile
    gives it a start. It says one thing for a whole pass: what a layer turns out to need corrects nothing until the next
    one. Where nobody says what a pass reads, it speaks after the first layer, of what layers used a pass before.

    Source: the purpose from He et al., ExpertFlow, arXiv 2410.17954; the method is this project's.
    """

    name = "path"
    Params = PathParams
    reads = True

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        check_size(self.name, 4 * num_layers * num_experts**2, "choose another predictor")
        self._learnt: tuple[NDArray[np.float32], NDArray[np.float32] | None] | None = None
        super().__init__(num_layers, num_experts, PathParams() if params is None else params)

    def learn(self, profile: Trace) -> None:
        self.reset()
        for event in routing_events(profile):
            if event.opening is not None:
                self.begin(before_first(event.sequence, event.step, event.phase, event.opening))
            self.observe(event)
        self._learnt = self._of_last, self._of_read

    def reset(self) -> None:
        super().reset()
        layers, experts = self.num_layers, self.num_experts
        of_last, of_read = self._learnt or (np.zeros((layers, experts + 1, experts), np.float32), None)
        # [L, E + 1, E]: what each expert of the pass before says of each one, and last a constant.
        self._of_last = of_last.copy()
        # [L, D, E]: what the embedding says, once there is one.
        self._of_read = None if of_read is None else of_read.copy()
        self._event: RoutingEvent | None = None
        self._tokens = Tokens()
        self._count = 1
        self._last = np.zeros((layers, experts + 1), np.float32)  # shares of the pass before, and 1
        self._last[:, -1] = 1
        self._now = self._last.copy()
        self._read: NDArray[np.float32] | None = None
        self._needs: NDArray[np.float32] | None = None  # [L, E]: one token's, in this pass

    def begin(self, event: RoutingEvent) -> None:
        assert event.opening is not None
        embedding = event.opening.embedding
        if embedding is not None and self._of_read is None:
            self._of_read = np.zeros((self.num_layers, len(embedding), self.num_experts), np.float32)
        self._read = None if embedding is None else embedding / np.float32(np.linalg.norm(embedding) + 1e-12)
        self._count = len(event.opening.ids)
        self._start(event)

    def observe(self, event: RoutingEvent) -> None:
        last = self._event
        if last is None or last[:2] != event[:2]:  # nobody has said what it reads
            self._read = None
            self._start(event)
        self._event = event
        self._count = self._tokens.of(event)
        shares = self._now[event.layer, :-1]
        shares[:] = 0
        shares[list(event.experts)] = np.array(event.tokens, np.float32) / np.float32(self._count)
        self._correct(event.layer, shares)

    def predict(self, depth: int) -> list[Prediction]:
        event, needs = self._event, self._needs
        if event is None or needs is None:
            return []
        return ranked_in_pass(event, depth, of_any_token(needs, self._count))

    def _start(self, event: RoutingEvent) -> None:
        """A pass begins: say what all its layers need."""
        if self._event is not None and self._event.sequence == event.sequence:
            self._last, self._now = self._now, self._last
        else:
            self._last[:, :-1] = 0
        self._event = event
        # Added up row by row, in order: a matrix product may do it differently from run to run.
        odds = np.add.reduce(self._of_last * self._last[:, :, None], axis=1)
        if self._read is not None and self._of_read is not None:
            odds += np.add.reduce(self._of_read * self._read[:, None], axis=1)
        share = self._tokens.share(self.num_experts)
        odds += math.log(share / (1 - share))
        self._needs = 1 / (1 + np.exp(-np.maximum(odds, -80)))

    def _correct(self, layer: int, shares: NDArray[np.float32]) -> None:
        """One step towards what was really needed, from the weights that made the forecast."""
        assert self._needs is not None
        inputs = self._last[layer]
        size = float((inputs**2).sum()) + (self._read is not None)
        step = (shares - self._needs[layer]) * np.float32(self.params.rate / size)
        used = np.flatnonzero(inputs)
        self._of_last[layer, used] += inputs[used, None] * step
        if self._read is not None and self._of_read is not None:
            self._of_read[layer] += self._read[:, None] * step
