"""How good a predictor is on a recorded trace: recall, precision and calibration, by distance and by layer.

A target is one event, together with what was predicted for it `distance` layers before; the layers at the start of a
pass are targets of the last layers of the pass before, and of the beginning of their own, if the predictor goes by what
a pass reads: the beginning counts as a layer before the first. Nothing is a target that ran before its sequence's first
prediction could be made. K is the number of experts that the target needs: of a single token the model's top-k, of
several tokens their union. Of the predictions, the likeliest K, K + 2 or 2 K count:

    recall       needed experts among them / needed experts
    precision    needed experts among them / how many they are, since a predictor may name fewer
    coverage     targets for which anything was predicted / targets

all of them sums over targets divided by sums. Calibration compares every probability with how often it came true.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent, before_first
from predictors.base import Prediction, Predictor

CUTS = ("K", "K+2", "2K")
BINS = 10


@dataclass(frozen=True, eq=False)
class Score:
    """Sums over the targets of one phase; index 0 of a distance axis is distance 1."""

    targets: NDArray[np.int64]
    """[D, L]."""
    covered: NDArray[np.int64]
    """[D, L]: targets for which anything was predicted."""
    needed: NDArray[np.int64]
    """[D, L]: experts."""
    predicted: NDArray[np.int64]
    """[D, L, cuts]."""
    right: NDArray[np.int64]
    """[D, L, cuts]: predicted and needed."""
    bins: NDArray[np.float64]
    """[D, BINS, 3]: predictions with a probability of that tenth, the sum of it, and how many came true."""

    @classmethod
    def zeros(cls, depth: int, num_layers: int) -> Score:
        targets, covered, needed = np.zeros((3, depth, num_layers), np.int64)
        predicted, right = np.zeros((2, depth, num_layers, len(CUTS)), np.int64)
        return cls(targets, covered, needed, predicted, right, np.zeros((depth, BINS, 3)))

    def add(self, event: RoutingEvent, distance: int, predictions: list[Prediction]) -> None:
        """Count what was predicted for `event` that many layers before."""
        at = distance - 1, event.layer
        needed = set(event.experts)
        came_true = [prediction.key.expert in needed for prediction in predictions]
        self.targets[at] += 1
        self.covered[at] += bool(predictions)
        self.needed[at] += (k := len(needed))
        sizes = [min(size, len(predictions)) for size in (k, k + 2, 2 * k)]
        self.predicted[at] += sizes
        self.right[at] += [sum(came_true[:size]) for size in sizes]
        bins = self.bins[distance - 1]
        for prediction, true in zip(predictions, came_true, strict=True):
            tenth = bins[min(int(prediction.probability * BINS), BINS - 1)]
            tenth[0] += 1
            tenth[1] += prediction.probability
            tenth[2] += true

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON types; rates without a single case are None."""
        distances = range(len(self.targets))
        needed, right, predicted = (array.sum(axis=1) for array in (self.needed, self.right, self.predicted))
        return {
            "targets": int(self.targets[:1].sum()),
            "recall": {str(d + 1): _by_cut(right[d], [needed[d]] * len(CUTS)) for d in distances},
            "precision": {str(d + 1): _by_cut(right[d], predicted[d]) for d in distances},
            "coverage": {str(d + 1): _rate(self.covered[d].sum(), self.targets[d].sum()) for d in distances},
            "calibration": {str(d + 1): [_bin(*tenth) for tenth in self.bins[d].tolist()] for d in distances},
            "by_layer": {
                str(d + 1): [_rate(*pair) for pair in zip(self.right[d, :, 0], self.needed[d], strict=True)]
                for d in distances
            },
        }


@dataclass(frozen=True)
class Evaluation:
    """How good a predictor is: at decoding, which is what counts, and at reading prompts."""

    predictor: str
    decode: Score
    prefill: Score
    params: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Decoding's figures, and under "prefill" the same of reading prompts, or None if there was none."""
        prefill = self.prefill.as_dict() if self.prefill.targets.any() else None
        return {"predictor": self.predictor, "params": self.params, **self.decode.as_dict(), "prefill": prefill}


def evaluate(predictor: Predictor, trace: Trace, depth: int = 3) -> Evaluation:
    """Let `predictor` watch `trace` from the start, and compare what it says up to `depth` layers ahead with it.

    The predictor is reset first. Looks further ahead than the model has layers are left out.
    """
    depth = min(depth, trace.num_layers)
    scores = {phase: Score.zeros(depth, trace.num_layers) for phase in Phase}
    predictor.reset()
    said: deque[list[list[Prediction]]] = deque(maxlen=depth)  # by the latest events, the last one first; by distance
    sequence = None
    for event in routing_events(trace):
        if event.sequence != sequence:
            said.clear()
            sequence = event.sequence
        if event.opening is not None and predictor.reads:
            predictor.begin(before_first(event.sequence, event.step, event.phase, event.opening))
            if said:  # more is known now than when the pass before ended
                said.popleft()
            said.appendleft(_by_distance(predictor, depth))
        for distance, predictions in enumerate(said, 1):
            scores[event.phase].add(event, distance, predictions[distance - 1])
        predictor.observe(event)
        said.appendleft(_by_distance(predictor, depth))
    params = dict(vars(predictor.params))
    return Evaluation(predictor.name, scores[Phase.DECODE], scores[Phase.PREFILL], params)


def _by_distance(predictor: Predictor, depth: int) -> list[list[Prediction]]:
    found: list[list[Prediction]] = [[] for _ in range(depth)]
    for prediction in predictor.predict(depth):
        found[prediction.lead_layers - 1].append(prediction)
    return found


def _by_cut(parts: Any, wholes: Any) -> dict[str, float | None]:
    return {cut: _rate(part, whole) for cut, part, whole in zip(CUTS, parts, wholes, strict=True)}


def _rate(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _bin(count: float, probabilities: float, true: float) -> dict[str, Any]:
    """What was said with a probability of one tenth: how often, how likely on average, how often it came true."""
    return {"predictions": int(count), "probability": _rate(probabilities, count), "came_true": _rate(true, count)}
