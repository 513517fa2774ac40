"""Several predictors as one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent
from predictors.base import Prediction, Predictor, build_predictor, register
from predictors.ranking import layers_ahead, ranked_each

_STEP = 0.05  # of the weights, at first; it shrinks as they settle
_CERTAIN = 0.995  # nobody is believed to be surer


@dataclass(frozen=True)
class EnsembleParams:
    """`parts`: the predictors, as they are named elsewhere. `reach`: how many layers ahead they are asked for."""

    parts: tuple[str, ...] = ("cross-layer-gate", "logistic")
    reach: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.parts, str) or not self.parts or self.reach < 1:
            raise ValueError(f"parts is {self.parts!r}, a tuple of names is needed; reach is {self.reach}, at least 1")


@dataclass(slots=True)
class _Opinions:
    """What the parts that said something of a layer said, before it came."""

    mix: _Mix
    odds: NDArray[np.float64]
    """[parts + 1, E]: log-odds, and a row of ones."""
    named: NDArray[np.bool_]
    """[E]: experts that any part named."""
    probabilities: NDArray[np.float64]
    """[E]: what comes of it."""


class _Mix:
    """How much each of some parts counts: a logistic regression of what was needed on their log-odds (AdaGrad)."""

    def __init__(self, parts: int) -> None:
        self.weights = np.full(parts + 1, 1 / parts)
        self.weights[-1] = 0
        self._squares = np.full(parts + 1, 1e-9)

    def mixed(self, odds: NDArray[np.float64]) -> NDArray[np.float64]:
        """The log-odds of each expert, [E]."""
        # Row by row, in order: a matrix product may add up differently from run to run.
        total: NDArray[np.float64] = np.add.reduce(odds * self.weights[:, None], axis=0)
        return total

    def correct(self, said: _Opinions, needed: NDArray[np.float64]) -> None:
        """One step towards what was really needed, among the experts that were named."""
        gradient = (said.odds * ((needed - said.probabilities) * said.named)).sum(axis=1)
        self._squares += gradient**2
        self.weights += _STEP * gradient / np.sqrt(self._squares)


@register
class Ensemble(Predictor):
    """The log-odds of its parts, weighted by how right each has been.

    The weights are fitted while running, apart for prompts and decoding, for each distance, and for each set of parts
    that have something to say of a layer. So parts may divide the layers among them: gates say nothing of the next
    pass, and what goes by ids does. Where a part names some experts of a layer, those it does not name count as half as
    likely as the last one it does. Nothing is said further ahead than `reach`.

    Source: stacking, Wolpert 1992; pooling experts' opinions by log-odds, Genest and Zidek 1986.
    """

    name = "ensemble"
    Params = EnsembleParams

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        chosen = EnsembleParams() if params is None else params
        self.parts = [build_predictor(spec, num_layers, num_experts) for spec in chosen.parts]
        future = [part.name for part in self.parts if not part.causal]
        if future:
            raise PolicyError(f"ensemble: {future[0]} asks for the future, and cannot be a part: leave it out")
        self.learns = any(part.learns for part in self.parts)
        self.looks_ahead = any(part.looks_ahead for part in self.parts)
        self._reach = min(chosen.reach, num_layers)
        super().__init__(num_layers, num_experts, chosen)

    def learn(self, profile: Trace) -> None:
        for part in self.parts:
            if part.can_learn:
                part.learn(profile)

    def reset(self) -> None:
        super().reset()
        for part in self.parts:
            part.reset()
        self._event: RoutingEvent | None = None
        self._mixes: dict[tuple[Phase, int, tuple[int, ...]], _Mix] = {}
        # Of the latest events, the last one first: what was said then, by distance.
        self._said: deque[list[_Opinions | None]] = deque(maxlen=self._reach)

    def observe(self, event: RoutingEvent) -> None:
        last = self._event
        if last is None or last.sequence != event.sequence or (last.layer + 1) % self.num_layers != event.layer:
            self._said.clear()
        self._event = event
        needed = np.zeros(self.num_experts)
        needed[list(event.experts)] = 1
        for distance, said in enumerate(self._said):
            if (opinions := said[distance]) is not None:
                opinions.mix.correct(opinions, needed)
        for part in self.parts:
            part.observe(event)
        self._said.appendleft(self._opinions(event.phase))

    def predict(self, depth: int) -> list[Prediction]:
        event = self._event
        if event is None:
            return []
        said = {lead: each for lead, each in enumerate(self._said[0][:depth], 1) if each is not None}
        if not said:
            return []
        ahead = layers_ahead(event.layer, self.num_layers)
        chances = np.array([each.probabilities for each in said.values()])
        chances *= [each.named for each in said.values()]
        return ranked_each([ahead[lead - 1] for lead in said], list(said), chances, self.num_experts)

    def _opinions(self, phase: Phase) -> list[_Opinions | None]:
        """What the parts say now, by distance; None where nobody says anything."""
        odds = np.ones((len(self.parts) + 1, self._reach, self.num_experts))
        named = np.zeros((self._reach, self.num_experts), np.bool_)
        speakers: list[list[int]] = [[] for _ in range(self._reach)]
        for number, part in enumerate(self.parts):
            if not (predictions := part.predict(self._reach)):
                continue
            keys, chances, leads = zip(*predictions, strict=True)
            lasts = dict(zip(leads, chances, strict=True))  # the least likely at each distance
            logs = _log_odds(np.array([*(chance / 2 for chance in lasts.values()), *chances]))
            for lead, unnamed in zip(lasts, logs.tolist(), strict=False):
                odds[number, lead - 1] = unnamed
                speakers[lead - 1].append(number)
            at = np.array(leads) - 1, np.array([expert for _, expert in keys])
            odds[number][at] = logs[len(lasts) :]
            named[at] = True
        mixed = np.zeros((self._reach, self.num_experts))
        chosen: list[tuple[_Mix, NDArray[np.float64]] | None] = [None] * self._reach
        for distance, numbers in enumerate(speakers):
            if numbers:
                key = phase, distance, tuple(numbers)
                if key not in self._mixes:
                    self._mixes[key] = _Mix(len(numbers))
                mix = self._mixes[key]
                of_speakers = odds[[*numbers, -1], distance]
                mixed[distance] = mix.mixed(of_speakers)
                chosen[distance] = mix, of_speakers
        probabilities = 1 / (1 + np.exp(-np.maximum(mixed, -30)))
        return [
            None if each is None else _Opinions(*each, named[distance], probabilities[distance])
            for distance, each in enumerate(chosen)
        ]


def _log_odds(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    bounded = np.minimum(np.maximum(probabilities, 1 - _CERTAIN), _CERTAIN)
    odds: NDArray[np.float64] = np.log(bounded / (1 - bounded))
    return odds
