"""What a fallback is: which precision serves an expert that is not there at the one it should have. Torch-free.

Fallbacks see ids, router weights and measured seconds, and nothing else: the same events give the same choices, live
and replayed. All but `none` change what the model says, so a user asks for each by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.registry import Part, Registry
from cache.traces.by_token import Mask, Routed
from cache.types import ExpertKey, RoutingEvent

SKIP = -1
"""In place of a precision: the expert is left out."""

LOW_SHARE = 0.25
"""Of the memory for experts, what holds those at the lowest precision, if nobody says."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A member of an event that is not resident at its target precision; precisions are indices, 0 the best."""

    key: ExpertKey
    share: float
    """Of the event's router weight."""
    before: float
    """The share of router weight that stronger members have: of the tokens that need it the least, if the fallback
    judges `by_token`; else of the event's totals. For one token both are the same."""
    target: int
    held: int | None
    """The best precision at which it is resident where it is computed."""
    fetch_s: tuple[float, ...]
    """How long what is missing takes on its channel, by precision; 0 where nothing was measured."""
    stand_in: ExpertKey | None = None
    """The first of the fallback's `stand_ins` that is resident at the target precision, and that neither the event nor
    a candidate of more weight has."""


class Choice(NamedTuple):
    """At which precision a candidate is computed now, and whether the target is fetched behind everything else.

    With `instead`, that expert is computed in its place.
    """

    precision: int
    later: bool = False
    instead: ExpertKey | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What `offload calibrate` says of a model: see offload/layers/calibration.py.

    `layers` [L]: how much the loss changes when a layer's weakest choice is dropped and the others take over its
    weight, their mean being 1; `unscaled` [L] the same where the others keep their weights.
    `importance`: by expert, how much it does when that expert alone has low precision.
    `super_experts` are never degraded. `similarity` [L, E, E]: how alike a layer's experts are, 1 for the same; of a
    model that was not calibrated, too, if the fallback `needs_similarity`.
    """

    layers: Sequence[float] = ()
    importance: Mapping[ExpertKey, float] | None = None
    super_experts: Collection[ExpertKey] = ()
    similarity: NDArray[np.float32] | None = None
    unscaled: Sequence[float] = ()


class Fallback(Part, ABC):
    """Chooses precisions. `precisions` is how many there are; the last one is the lowest."""

    lossy: ClassVar[bool] = True
    needs_lower: bool = True
    """Whether it chooses among several precisions; may depend on its parameters."""
    needs_calibration: ClassVar[bool] = False
    """Whether `offload calibrate` must have measured the model."""
    needs_similarity: ClassVar[bool] = False
    base_first: ClassVar[bool] = False
    """Whether what the lowest precision takes travels before anything that only better ones do."""
    by_token: ClassVar[bool] = False
    """Whether it judges a missing expert by each token that needs it; see `Candidate.before`."""
    gates: bool = False
    """Whether `keep` may drop experts of tokens, resident or not; may depend on its parameters."""
    renormalises: bool = False
    """Whether what remains of a token then takes over the weight of what is dropped."""
    keeps_low: ClassVar[bool] = False
    """Whether a copy of every expert at the lowest precision stays in host memory."""

    def __init__(self, num_layers: int, num_experts: int, precisions: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, params)
        self.precisions = precisions
        self.sensitivity = Sensitivity()

    @property
    def low_share(self) -> float:
        """Of the memory for experts, what holds those at the lowest precision."""
        return float(getattr(self.params, "low_share", LOW_SHARE))

    def learn(self, sensitivity: Sensitivity) -> None:
        """Called once before the first event, with what is known of the model."""
        self.sensitivity = sensitivity

    def target(self, key: ExpertKey) -> int:
        """The precision an expert has when nothing is in the way."""
        return 0

    def targets(self, event: RoutingEvent) -> Sequence[int]:
        """That of each member of an event, in the event's order. Asked once for every event, in running order; not
        where there is one precision."""
        return [self.target(key) for key in event.keys]

    def hotness(self, key: ExpertKey) -> float:
        """What is fetched first, of experts with as many tokens of an event: the higher ones, then those of the highest
        weight."""
        return 0.0

    def stand_ins(self, key: ExpertKey) -> Sequence[ExpertKey]:
        """Experts of the same layer that may be computed in its place, the best first."""
        return ()

    def keep(self, routed: Routed) -> Mask:
        """Which pairs of a token and an expert remain [T, K]; asked before there is an event, if it `gates`. What no
        token keeps is not in the event. Super experts remain in any case."""
        return np.ones(routed.experts.shape, bool)

    @abstractmethod
    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        """A choice for each candidate; `candidates` ascend in weight. `spare_s` is what computing the members that are
        there takes. Super experts are not asked about."""


_registry: Registry[Fallback] = Registry("fallback", Fallback, ["offload.decide.fallbacks"])  # type: ignore[type-abstract]
register = _registry.register


def find_fallback(spec: str) -> type[Fallback]:
    """The class named by `spec`. Raises PolicyError."""
    return _registry.find(spec)


def make_fallback(spec: str, num_layers: int, num_experts: int, precisions: int) -> Fallback:
    """A fallback for a model of that shape, stored at so many precisions. Raises PolicyError."""
    fallback = _registry.make(spec, num_layers, num_experts, precisions)
    if not 0 < fallback.low_share < 1 and precisions > 1:
        raise PolicyError(f'fallback "{spec}": low_share lies between 0 and 1')
    return fallback
