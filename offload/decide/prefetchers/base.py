"""What a prefetch rule is: which of the experts that a predictor expects are fetched, in which order. Torch-free.

Rules see ids, probabilities and measured seconds, and nothing else: the same events give the same fetches, live and
replayed. A rule only chooses. What is on its way, what is taken back, and what became of it is in
`offload/decide/prefetch.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cache.registry import Part, Registry
from cache.residency import State
from cache.types import ExpertKey, RoutingEvent, Tier
from offload.decide.gain import Makespans
from offload.decide.pace import Pace
from offload.decide.parcel import Parcel, SliceKey
from offload.decide.plan import LayerPlan
from offload.decide.schedulers.base import Costs
from offload.decide.stacks import Stacks
from predictors.base import Prediction


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a prefetcher knows when an event has come, beside its plan and the caches.

    `predicted` are all expectations, by key. `target` is the precision that an expert should have. `costs` are those by
    which layers are divided, where the CPU computes beside an accelerator. `top_k` is how many experts the last event
    needed. `unused` are slices that were fetched ahead
    and neither used nor evicted since. `regret` says how often an expert evicted for a prefetch is soon missed.
    `similarity` is how like the present the predictor's source is, 0 to 1, if it says so. `busy_s` is how long each
    source's channel is busy with what was decided until now.
    """

    predicted: Mapping[ExpertKey, Prediction]
    pace: Pace
    makespans: Makespans
    depth: int
    top_k: int
    num_layers: int
    target: Callable[[ExpertKey], int]
    costs: Costs | None
    unused: Collection[SliceKey]
    regret: Callable[[], float]
    similarity: float | None
    busy_s: dict[Tier, float]
    begin: Callable[[Prediction, Parcel], None]


class Outlook:
    """What one event leaves to be fetched ahead. Times are seconds from the start of the event.

    A rule looks at what is `expected` or `absent`, asks for an `offer`, and begins it.
    """

    def __init__(self, plan: LayerPlan, stacks: Stacks, known: Known) -> None:
        phase, pace = plan.event.phase, known.pace
        self.event: RoutingEvent = plan.event
        self.top_k = known.top_k
        """How many experts the last event needed: this one, unless a pass is about to begin."""
        self.known = known
        self.expert_s, self.dense_s = pace.expert_s[phase], pace.dense_s[phase]
        self.fetch_s = max(pace.fetch_s.values())
        """One expert on the slowest channel."""
        self.depth = known.depth
        self._stacks = stacks
        self._missing = len(plan.fetches) + len(plan.late_fetches)
        self._starts_s: list[float] = []
        # Members are in use, and what late fetches evict keeps its slot until they start.
        self._engaged = set(plan.event.keys)
        for fetch in plan.late_fetches:
            self._engaged.update(*fetch.evicted.values())
        self._by_lead: dict[int, list[Prediction]] = {}
        for prediction in known.predicted.values():
            self._by_lead.setdefault(prediction.lead_layers, []).append(prediction)

    def starts_s(self, lead: int) -> float:
        """When the routing of the layer so far ahead will be known."""
        known, top_k = self.known, self.top_k
        while len(self._starts_s) < lead:
            if not self._starts_s:
                computes = bool(self.event.experts)  # and does not only begin
                now_s = known.makespans.of(top_k, self._missing, self.expert_s, self.fetch_s) if computes else 0.0
                self._starts_s.append(now_s + self.dense_s)
            else:
                later_s = known.makespans.of(top_k, 0, self.expert_s, 0.0) + self.dense_s
                self._starts_s.append(self._starts_s[-1] + later_s)
        return self._starts_s[lead - 1]

    def expected(self, lead: int) -> Sequence[Prediction]:
        """What the layer so far ahead is expected to need, resident or not, as the predictor has them: the likeliest
        first."""
        return self._by_lead.get(lead, ())

    def is_absent(self, prediction: Prediction) -> bool:
        """Whether it would have to be fetched, and can be: it is neither there nor on its way at its precision."""
        key = prediction.key
        return key not in self._engaged and self._stacks.state(key, self.known.target(key)) is State.MISS

    def absent(self, lead: int) -> list[Prediction]:
        """Those of the expected that would have to be fetched."""
        return [prediction for prediction in self.expected(lead) if self.is_absent(prediction)]

    def offer(self, prediction: Prediction, precision: int | None = None) -> Offer:
        """What fetching one of the absent takes, at the precision it should have or another one."""
        at = self.known.target(prediction.key) if precision is None else precision
        return Offer(self, prediction, Parcel(prediction.key, at, self._stacks))

    def lacks(self, key: ExpertKey, precision: int) -> bool:
        """Whether a precision of an expert is neither there nor on its way."""
        return self._stacks.state(key, precision) is State.MISS

    @property
    def precisions(self) -> int:
        """How many there are; the last one is the lowest."""
        return len(self._stacks.precisions)

    def held(self, layer: int) -> list[ExpertKey]:
        """The experts of the first slice that share the layer's cache and have arrived."""
        cache = self._stacks.by_slice[0][0]
        lane = cache.lane_of(layer)
        return [key for key in cache.resident() if cache.lane_of(key.layer) == lane]


class Offer:
    """One fetch that might be begun: how long it takes, when its channels are free for it, and what goes for it."""

    def __init__(self, outlook: Outlook, prediction: Prediction, parcel: Parcel) -> None:
        known = outlook.known
        self._known, self._prediction, self._parcel = known, prediction, parcel
        self._times = parcel.times(known.pace.fetch_s, outlook.fetch_s)
        self.fetch_s = sum(self._times.values())
        self.begins_s = max(known.busy_s.get(source, 0.0) for source in self._times)

    def find_room(self, protected: Collection[ExpertKey] = ()) -> bool:
        """Whether there is a place, of something that is neither expected nor `protected`."""
        predicted = self._known.predicted
        return self._parcel.find_room({*predicted, *protected} if protected else predicted)

    @property
    def evicts(self) -> bool:
        """Once room was found: whether something goes for it from the tier that computes."""
        return bool(self._parcel.victims())

    def begin(self) -> None:
        """Begin it. Room must have been found."""
        self._known.begin(self._prediction, self._parcel)
        for source, seconds in self._times.items():
            self._known.busy_s[source] = self._known.busy_s.get(source, 0.0) + seconds


class PrefetchRule(Part, ABC):
    """Chooses what is fetched ahead after an event."""

    reach: ClassVar[int | None] = None
    """How many layers it looks ahead if nobody says: 0 for all of them, None for as many as runs by default."""

    least: ClassVar[float] = 0.05
    """What is less probable is not worth a thought."""

    def __init__(self, params: Any = None) -> None:  # no shape: what it needs of the model is in its outlook
        self.params = self.Params() if params is None else params
        self.reset()

    def __repr__(self) -> str:
        return f"{self.name}({self.params})"

    def reset(self) -> None:
        """Forget the events seen so far. Subclasses that remember any create their state here."""

    @abstractmethod
    def choose(self, outlook: Outlook) -> None:
        """Begin what is worth it, the most urgent first: channels carry in this order."""


_registry: Registry[PrefetchRule] = Registry(
    "prefetcher",
    PrefetchRule,  # type: ignore[type-abstract]
    ["offload.decide.prefetchers"],
)
register = _registry.register
OURS = "ours"
"""What runs if nobody says."""
rule_names = _registry.names


def find_rule(spec: str) -> type[PrefetchRule]:
    """The class named by `spec`. Raises PolicyError."""
    return _registry.find(spec)


def make_rule(spec: str) -> PrefetchRule:
    """The prefetch rule that `spec` names, such as "ours" or "speculative(n=2)". Raises PolicyError."""
    return _registry.make(spec)
