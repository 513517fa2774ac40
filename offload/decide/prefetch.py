"""What is fetched before it is asked for: predictions in, fetches out. Torch-free, part of the decision loop.

After a layer's routing is known, a predictor says what the next layers will need, and a rule which of that to fetch, in
which order (`offload/decide/prefetchers/`). An expert is fetched ahead with all slices of a precision or none, and only
where there is room without giving up something that is needed itself. Fetches on demand always overtake, and what turns
out unneeded is taken back if it has not begun.

Where a prompt's next layer needs nearly all its experts (`offload/decide/prefill.py`), no predictor is asked and
nothing is weighed: they are fetched in the order of their frequency, as many as the channels bring during the dense
part, so that these never idle. What gives them its place has been computed, or is needed by fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from cache.residency import State
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.gain import Makespans
from offload.decide.pace import Pace, PassTime, Switch
from offload.decide.parcel import Parcel, SliceKey
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.prefetchers.base import OURS, Known, Outlook, PrefetchRule, make_rule
from offload.decide.schedulers.base import Costs
from offload.decide.stacks import Stacks
from predictors.base import Prediction, Predictor

_AT_THE_START = 2
"""Experts that should be there when a streamed layer begins: one to compute, and the next to follow it."""


@dataclass(slots=True)
class _Flight:
    """A prefetch that has not arrived. `due` is the time of the event it is for."""

    fetch: Fetch
    due: int
    called_back: bool = False


class Prefetcher:
    """Decides what to prefetch, and keeps the books: what is on its way, what was useful, what it cost.

    `depth` is how many layers ahead it looks. `rule` chooses what is fetched, by default this project's own.
    `adaptive`: whether it may switch itself off where passes take longer with it than without.
    """

    def __init__(
        self, predictor: Predictor, depth: int, rule: PrefetchRule | None = None, *, adaptive: bool = True
    ) -> None:
        if not 1 <= depth <= predictor.num_layers:
            raise ValueError(f"a depth of {depth} for {predictor.num_layers} layers")
        self.predictor = predictor
        self.depth = depth
        self.rule = make_rule(OURS) if rule is None else rule
        self.predicts = predictor.name != "none"
        """Whether anything but a prompt's next layer is ever fetched ahead."""
        self.pace = Pace()
        self.switch = Switch() if adaptive else None
        self.predicted: dict[ExpertKey, Prediction] = {}
        """What is expected after the last event."""
        self.streams = False
        """Whether that is what a prompt's next layer needs, to be planned before the event's own fetches."""
        self.flights: dict[SliceKey, _Flight] = {}
        self._makespans = Makespans()
        self._num_layers = predictor.num_layers
        self._time = 0  # events so far
        self._top_k = 1  # members of the last one
        self._unused: set[SliceKey] = set()  # prefetched, arrived or not, and neither used nor evicted since
        self._given_up: dict[SliceKey, int] = {}  # evicted for a prefetch, and when
        self._regrets, self._evictions = 1.0, 4.0  # as if a quarter of four had been missed

    @property
    def active(self) -> bool:
        """Whether it fetches at all, now."""
        return self.switch is None or self.switch.on

    @property
    def listens(self) -> bool:
        """Whether its predictor has to see an event before the next one."""
        return self.predicts and (self.active or not self.predictor.causal)

    @property
    def reads(self) -> bool:
        """Whether its predictor goes by what a pass reads."""
        return self.predictor.reads and self.listens

    def concerned(self, event: RoutingEvent) -> bool:
        """Whether it has anything to do with an event; without a predictor that is so while a prompt is read, and until
        it is known what became of the experts streamed for it."""
        return self.predicts or event.phase is Phase.PREFILL or bool(self.flights) or bool(self._unused)

    def observe(self, event: RoutingEvent, streamed: Sequence[Prediction] = ()) -> Collection[ExpertKey]:
        """An event has come: learn from it, and say what comes next. Gives the keys that are expected.

        `streamed` is what a prompt's next layer will need, in the order in which to fetch it: if there is any, it takes
        the place of predictions. While it is off nobody predicts, so that a predictor's own time counts in the trial;
        an oracle must not lose its place.
        """
        self._time += 1
        self.predicted = {}
        self.streams = bool(streamed)
        if self.listens:
            self.predictor.observe(event)
        self._top_k = len(event.experts)
        if streamed:
            return self._expect(streamed)
        return self._expect(self.predictor.predict(self.depth), self.rule.least) if self.active else ()

    def begin(self, event: RoutingEvent) -> Collection[ExpertKey]:
        """A pass begins that reads what `event` says: say what comes. Gives the keys that are expected.

        What the pass before left to be expected of this one is forgotten: now more is known.
        """
        self.streams = False
        self.predictor.begin(event)
        return self._expect(self.predictor.predict(self.depth), self.rule.least) if self.active else ()

    def _expect(self, predictions: Sequence[Prediction], least: float = 0.0) -> Collection[ExpertKey]:
        """Keep what is said, from the probability `least` on. Gives what is more likely needed than not."""
        self.predicted = {each.key: each for each in predictions if each.probability >= least}
        return [key for key, prediction in self.predicted.items() if prediction.probability >= 0.5]

    def used(self, slices: Iterable[SliceKey], missing: Iterable[SliceKey]) -> int:
        """These are needed now, of which some were `missing`. Gives how many of them had been prefetched."""
        for wanted in missing:
            given_up = self._given_up.pop(wanted, None)
            if given_up is not None and self._time - given_up <= self._num_layers:
                self._regrets += 1
        return self._settle(slices)

    def evicted(self, slices: Iterable[SliceKey]) -> int:
        """The computing tier gave these up. Gives how many of them had been prefetched and never used."""
        return self._settle(slices)

    def landed(self, fetch: Fetch) -> bool:
        """A transfer ended, whichever way. Gives whether it was a prefetch."""
        flight = self.flights.get((fetch.key, fetch.slice))
        if flight is None or flight.fetch is not fetch:
            return False
        del self.flights[fetch.key, fetch.slice]
        return True

    def abandoned(self, fetch: Fetch) -> None:
        """A prefetch ended without its bytes: it is neither useful nor wasted."""
        self._settle([(fetch.key, fetch.slice)])

    def passed(self, time: PassTime) -> None:
        """A forward pass is over."""
        self.pace.update(time)
        if self.switch is not None and time.phase is Phase.DECODE:
            self.switch.passed(time.seconds)

    def reset(self) -> None:
        """Forget the sequences seen, as a cold start does; what was measured stays. Nothing may be on its way."""
        if self.predictor.causal:
            self.predictor.reset()
        self.flights.clear()
        self.predicted = {}
        self._unused.clear()
        self._given_up.clear()
        self.rule.reset()

    def plan(
        self, plan: LayerPlan, stacks: Stacks, target: Callable[[ExpertKey], int], costs: Costs | None = None
    ) -> None:
        """Add to `plan` what to fetch ahead and what to take back; reserves and evicts for the former.

        `target` is the precision that an expert should have. `costs` are those by which layers are divided, where the
        CPU computes beside an accelerator.
        """
        tokens = plan.event.tokens
        each = max(sum(tokens) // max(len(tokens), 1), 1)
        self._makespans.cpu_s = None if costs is None else costs.cpu_s(each)
        for (key, _), flight in self.flights.items():
            overtaken = flight.due <= self._time or key not in self.predicted
            if overtaken and not flight.called_back and key not in plan.awaited:
                flight.called_back = True
                plan.cancelled.append(flight.fetch)
        if self.streams:
            self._stream(plan, stacks, target)
        elif self.predicted and plan.event.phase in self.pace.expert_s and self.pace.fetch_s:
            self._choose(plan, stacks, target, costs)

    def _choose(self, plan: LayerPlan, stacks: Stacks, target: Callable[[ExpertKey], int], costs: Costs | None) -> None:
        """Let the rule begin what it thinks is worth it."""

        def begin(prediction: Prediction, parcel: Parcel) -> None:
            victims = parcel.victims()
            self._evictions += len(victims)
            self._given_up.update(dict.fromkeys(victims, self._time))
            self._begin(plan, prediction, parcel)

        known = Known(
            predicted=self.predicted,
            pace=self.pace,
            makespans=self._makespans,
            depth=self.depth,
            top_k=self._top_k,
            num_layers=self._num_layers,
            target=target,
            costs=costs,
            unused=self._unused,
            regret=lambda: self._regrets / self._evictions,
            similarity=self.predictor.similarity,
            busy_s=self._channels(plan, stacks),
            begin=begin,
        )
        self.rule.choose(Outlook(plan, stacks, known))

    def _stream(self, plan: LayerPlan, stacks: Stacks, target: Callable[[ExpertKey], int]) -> None:
        """Begin what a prompt's next layer needs, as long as fewer than one of it is expected to be needless.

        At most a quarter of a cache is given to it: the quarter before may still be in use. Without a pace, before the
        first pass is over, there is no other bound. What is frequent enough to stay in the rest never goes for it.
        """
        begun: dict[Tier, float] = {}  # first slices
        needless = 0.0
        quarters = [_quarter(stacks, slices) for slices in stacks.precisions]
        for prediction in self.predicted.values():
            key, precision = prediction.key, target(prediction.key)
            most = quarters[precision]
            if stacks.state(key, precision) is not State.MISS:
                continue
            parcel = Parcel(key, precision, stacks)
            rooms = {source: self._meanwhile(plan.event.phase, source, most) for source in parcel.sources}
            if any(begun.get(source, 0) >= room for source, room in rooms.items()):
                continue
            needless += 1 - prediction.probability
            if needless >= 1 or sum(begun.values()) >= most:
                return
            if parcel.find_room(self.predicted) and not parcel.costs_the_kept(2 * max(rooms.values())):
                self._begin(plan, prediction, parcel)
                for source, slices in parcel.load().items():
                    begun[source] = begun.get(source, 0) + slices

    def _meanwhile(self, phase: Phase, source: Tier, most: int) -> int:
        """How many experts come from a tier during the dense part of a layer, and until its experts are computed."""
        fetch_s = self.pace.fetch_s.get(source)
        if not fetch_s or phase not in self.pace.dense_s:
            return most
        return min(ceil(self.pace.dense_s[phase] / fetch_s) + _AT_THE_START, most)

    def _settle(self, slices: Iterable[SliceKey]) -> int:
        """What became of these is known. Gives how many of them were prefetches that it was not known of."""
        before = len(self._unused)
        self._unused.difference_update(slices)
        return before - len(self._unused)

    def _begin(self, plan: LayerPlan, prediction: Prediction, parcel: Parcel) -> None:
        """Reserve the places of a prefetch, and plan it."""
        for fetch in parcel.reserve():
            self.flights[fetch.key, fetch.slice] = _Flight(fetch, self._time + prediction.lead_layers)
            self._unused.add((fetch.key, fetch.slice))
            plan.prefetches.append(fetch)

    def _channels(self, plan: LayerPlan, stacks: Stacks) -> dict[Tier, float]:
        """By source, how long its channel is busy with what was decided until now."""
        busy_s: dict[Tier, float] = {}
        flying = [flight.fetch for flight in self.flights.values() if flight.fetch not in plan.cancelled]
        for fetch in (*plan.fetches, *plan.late_fetches, *flying):
            seconds = self.pace.fetch_s.get(fetch.source, 0.0) * stacks.weight(fetch.slice)
            busy_s[fetch.source] = busy_s.get(fetch.source, 0.0) + seconds
        return busy_s


def _quarter(stacks: Stacks, slices: Sequence[int]) -> int:
    """How many experts with these slices fit a quarter of every cache."""
    return min(cache.capacity_bytes // (4 * stacks.sizes[s]) for s in slices for cache in stacks.by_slice[s])
