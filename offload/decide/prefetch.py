"""What is fetched before it is asked for: predictions in, fetches out. Torch-free, part of the decision loop.

After a layer's routing is known, a predictor says what the next layers will need. What of that is missing is worth
fetching if the transfer can begin before the layer does, if what it saves is more than what it may cost, and if there
is room without giving up something that is needed itself:

    gain = p * (part of the transfer that is hidden) * (makespan of the layer without it - with it)
    loss = (1 - p) * (how often an expert evicted for a prefetch is soon missed) * (its transfer)

Gain by makespan: HybriMoE, arXiv 2504.05897. Only what fits the window before the farthest predicted layer is begun,
the nearest layer first; fetches on demand always overtake, and what turns out unneeded is taken back if it has not
begun.

Where a prompt's next layer needs nearly all its experts (`offload/decide/prefill.py`), no predictor is asked and
nothing is weighed: they are fetched in the order of their frequency, as many as the channels bring during the dense
part, so that these never idle. What gives them its place has been computed, or is needed by fewer tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil

from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.pace import Pace, PassTime, Switch
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.schedulers.base import Costs, Load
from offload.decide.schedulers.gpu_only import GpuOnly
from offload.decide.schedulers.hybrimoe import HybriMoE
from predictors.base import Prediction, Predictor

_LEAST_PROBABILITY = 0.05
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

    `depth` is how many layers ahead it looks; `slot_bytes` what one expert takes in any tier. `adaptive`: whether it
    may switch itself off where passes take longer with it than without.
    """

    def __init__(self, predictor: Predictor, depth: int, slot_bytes: int, *, adaptive: bool = True) -> None:
        if not 1 <= depth <= predictor.num_layers:
            raise ValueError(f"a depth of {depth} for {predictor.num_layers} layers")
        self.predictor = predictor
        self.depth = depth
        self.predicts = predictor.name != "none"
        """Whether anything but a prompt's next layer is ever fetched ahead."""
        self.pace = Pace()
        self.switch = Switch() if adaptive else None
        self.predicted: dict[ExpertKey, Prediction] = {}
        """What is expected after the last event."""
        self.streams = False
        """Whether that is what a prompt's next layer needs, to be planned before the event's own fetches."""
        self.flights: dict[ExpertKey, _Flight] = {}
        self._slot_bytes = slot_bytes
        self._on_demand, self._divided = GpuOnly(), HybriMoE()
        self._cpu_s: float | None = None  # one expert on the CPU, where that computes beside the accelerator
        self._num_layers = predictor.num_layers
        self._time = 0  # events so far
        self._unused: set[ExpertKey] = set()  # prefetched, arrived or not, and neither used nor evicted since
        self._given_up: dict[ExpertKey, int] = {}  # evicted for a prefetch, and when
        self._regrets, self._evictions = 1.0, 4.0  # as if a quarter of four had been missed
        self._makespans: dict[tuple[int, int, float, float, float | None], float] = {}

    @property
    def active(self) -> bool:
        """Whether it fetches at all, now."""
        return self.switch is None or self.switch.on

    @property
    def listens(self) -> bool:
        """Whether its predictor has to see an event before the next one."""
        return self.predicts and (self.active or not self.predictor.causal)

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
        if streamed:
            self.predicted = {prediction.key: prediction for prediction in streamed}
        elif self.active:
            self.predicted = {
                prediction.key: prediction
                for prediction in self.predictor.predict(self.depth)
                if prediction.probability >= _LEAST_PROBABILITY
            }
        return [key for key, prediction in self.predicted.items() if prediction.probability >= 0.5]

    def used(self, keys: Sequence[ExpertKey], missing: Sequence[ExpertKey]) -> int:
        """These are needed now, of which some were `missing`. Gives how many of them had been prefetched."""
        for key in missing:
            given_up = self._given_up.pop(key, None)
            if given_up is not None and self._time - given_up <= self._num_layers:
                self._regrets += 1
        return self._settle(keys)

    def evicted(self, keys: Sequence[ExpertKey]) -> int:
        """The computing tier gave these up. Gives how many of them had been prefetched and never used."""
        return self._settle(keys)

    def landed(self, fetch: Fetch) -> bool:
        """A transfer ended, whichever way. Gives whether it was a prefetch."""
        flight = self.flights.get(fetch.key)
        if flight is None or flight.fetch is not fetch:
            return False
        del self.flights[fetch.key]
        return True

    def abandoned(self, key: ExpertKey) -> None:
        """A prefetch ended without its expert: it is neither useful nor wasted."""
        self._settle([key])

    def passed(self, time: PassTime) -> None:
        """A forward pass is over."""
        self.pace.update(time)
        if self.switch is not None and time.phase is Phase.DECODE:
            self.switch.passed(time.seconds)

    def reset(self) -> None:
        """Forget the sequences seen, as a cold start does; what was measured stays. Nothing may be on its way."""
        if self.predictor.causal:
            self.predictor.reset()
        self.predicted = {}
        self._unused.clear()
        self._given_up.clear()

    def plan(self, plan: LayerPlan, caches: Sequence[ExpertCache], costs: Costs | None = None) -> None:
        """Add to `plan` what to fetch ahead and what to take back; reserves and evicts for the former.

        `costs` are those by which layers are divided, where the CPU computes beside an accelerator: a fetch then saves
        no more than it takes the CPU to do without.
        """
        event = plan.event
        self._cpu_s = None if costs is None else costs.cpu_s(max(sum(event.tokens) // len(event.tokens), 1))
        for key, flight in self.flights.items():
            overtaken = flight.due <= self._time or key not in self.predicted
            if overtaken and not flight.called_back and key not in plan.awaited:
                flight.called_back = True
                plan.cancelled.append(flight.fetch)
        if self.streams:
            self._stream(plan, caches)
            return
        phase = plan.event.phase
        pace = self.pace
        if not self.predicted or phase not in pace.expert_s or not pace.fetch_s:
            return
        expert_s, dense_s = pace.expert_s[phase], pace.dense_s[phase]
        channels = self._channels(plan)
        slowest_s = max(pace.fetch_s.values())
        top_k = len(plan.event.experts)
        # When the routing of the layer at each lead will be known, from the start of this event.
        starts_s = self._makespan(top_k, len(plan.fetches) + len(plan.late_fetches), expert_s, slowest_s) + dense_s
        # Members are in use, and what late fetches evict keeps its slot until they start.
        engaged = set(plan.event.keys)
        for fetch in plan.late_fetches:
            engaged.update(*fetch.evicted.values())
        by_lead: dict[int, list[Prediction]] = {}
        for prediction in self.predicted.values():
            by_lead.setdefault(prediction.lead_layers, []).append(prediction)
        for lead in range(1, self.depth + 1):
            absent = [
                prediction
                for prediction in by_lead.get(lead, ())
                if prediction.key not in engaged and caches[0].state(prediction.key) is State.MISS
            ]
            expected = sum(prediction.probability for prediction in absent)
            for prediction in absent:
                source = nearest(prediction.key, caches[1:])
                fetch_s = pace.fetch_s.get(source, slowest_s)
                slack_s = starts_s - channels.get(source, 0.0)
                if slack_s <= 0:
                    continue
                missing = min(max(round(expected), 1), top_k)
                saved_s = self._makespan(top_k, missing, expert_s, fetch_s)
                saved_s -= self._makespan(top_k, missing - 1, expert_s, fetch_s)
                gain_s = prediction.probability * min(slack_s / fetch_s, 1.0) * saved_s if fetch_s else 0.0
                if gain_s <= 0:
                    continue
                victims = self._room(prediction.key, source, caches)
                loss_s = (1 - prediction.probability) * self._regrets / self._evictions * fetch_s
                if victims is None or (victims[0] and gain_s <= loss_s):
                    continue
                for victim in victims[0]:
                    self._evictions += 1
                    self._given_up[victim] = self._time
                self._begin(plan, prediction, source, victims, caches)
                channels[source] = channels.get(source, 0.0) + fetch_s
                expected -= prediction.probability
            starts_s += self._makespan(top_k, 0, expert_s, 0.0) + dense_s

    def _stream(self, plan: LayerPlan, caches: Sequence[ExpertCache]) -> None:
        """Begin what a prompt's next layer needs, as long as fewer than one of it is expected to be needless.

        At most a quarter of a cache is given to it: the quarter before may still be in use. Without a pace, before the
        first pass is over, there is no other bound. What is frequent enough to stay in the rest never goes for it.
        """
        most = min(cache.capacity_bytes for cache in caches) // (4 * self._slot_bytes)
        begun: dict[Tier, int] = {}
        needless = 0.0
        for prediction in self.predicted.values():
            key = prediction.key
            if caches[0].state(key) is not State.MISS:
                continue
            source = nearest(key, caches[1:])
            room = self._meanwhile(plan.event.phase, source, most)
            if begun.get(source, 0) >= room:
                continue
            needless += 1 - prediction.probability
            if needless >= 1 or sum(begun.values()) >= most:
                return
            victims = self._room(key, source, caches)
            if victims is not None and not self._kept(key, source, victims, caches, 2 * room):
                self._begin(plan, prediction, source, victims, caches)
                begun[source] = begun.get(source, 0) + 1

    def _kept(
        self,
        key: ExpertKey,
        source: Tier,
        victims: Sequence[Sequence[ExpertKey]],
        caches: Sequence[ExpertCache],
        passage: int,
    ) -> bool:
        """Whether any of `victims` is worth keeping for later chunks, in caches of which so many places are passage."""
        return any(
            cache.among_highest(victim, self._slot_bytes, passage)
            for cache, found in zip(_on_the_way(key, source, caches), victims, strict=True)
            for victim in found
        )

    def _meanwhile(self, phase: Phase, source: Tier, most: int) -> int:
        """How many experts come from a tier during the dense part of a layer, and until its experts are computed."""
        fetch_s = self.pace.fetch_s.get(source)
        if not fetch_s or phase not in self.pace.dense_s:
            return most
        return min(ceil(self.pace.dense_s[phase] / fetch_s) + _AT_THE_START, most)

    def _settle(self, keys: Sequence[ExpertKey]) -> int:
        """What became of these is known. Gives how many of them were prefetches that it was not known of."""
        before = len(self._unused)
        self._unused.difference_update(keys)
        return before - len(self._unused)

    def _room(self, key: ExpertKey, source: Tier, caches: Sequence[ExpertCache]) -> list[list[ExpertKey]] | None:
        """What has to go for a prefetch, in each tier on its way up that has no place for it; None: too much."""
        found = []
        for cache in _on_the_way(key, source, caches):
            victims = cache.victims(key, self._slot_bytes, self.predicted)
            if victims is None:
                return None
            found.append(victims)
        return found

    def _begin(
        self,
        plan: LayerPlan,
        prediction: Prediction,
        source: Tier,
        victims: Sequence[Sequence[ExpertKey]],
        caches: Sequence[ExpertCache],
    ) -> None:
        """Reserve the places of a prefetch, for which `victims` go, and plan it."""
        key = prediction.key
        tiers = _on_the_way(key, source, caches)
        fetch = Fetch(key, source, tuple(cache.tier for cache in tiers))
        for cache, expected in zip(tiers, victims, strict=True):
            if expected:
                fetch.evicted[cache.tier] = list(expected)
            cache.reserve(key, self._slot_bytes, self.predicted)
        if source is not Tier.DISK:
            caches[_index(caches, source)].pin(key)  # the bytes are copied from there, some time later
        self.flights[key] = _Flight(fetch, self._time + prediction.lead_layers)
        self._unused.add(key)
        plan.prefetches.append(fetch)

    def _channels(self, plan: LayerPlan) -> dict[Tier, float]:
        """By source, how long its channel is busy with what was decided until now."""
        busy_s: dict[Tier, float] = {}
        flying = [flight.fetch for flight in self.flights.values() if flight.fetch not in plan.cancelled]
        for fetch in (*plan.fetches, *plan.late_fetches, *flying):
            busy_s[fetch.source] = busy_s.get(fetch.source, 0.0) + self.pace.fetch_s.get(fetch.source, 0.0)
        return busy_s

    def _makespan(self, experts: int, missing: int, expert_s: float, fetch_s: float) -> float:
        """An event of so many experts, of which so many are not where they compute when it begins."""
        cpu_s = self._cpu_s
        asked = experts, missing, expert_s, fetch_s, cpu_s
        if asked not in self._makespans:
            if len(self._makespans) > 1000:  # times change with every pass
                self._makespans.clear()
            rule = self._on_demand if cpu_s is None else self._divided
            costs = Costs(gpu_s=lambda tokens: expert_s, cpu_s=lambda tokens: cpu_s or expert_s, copy_s=fetch_s)
            loads = [Load(1, index >= missing) for index in range(experts)]
            self._makespans[asked] = rule.assign(loads, costs).makespan_s
        return self._makespans[asked]


def _on_the_way(key: ExpertKey, source: Tier, caches: Sequence[ExpertCache]) -> list[ExpertCache]:
    """The tiers nearer than `source` that have no place for an expert."""
    return [cache for cache in caches[: _index(caches, source)] if cache.state(key) is State.MISS]


def _index(caches: Sequence[ExpertCache], tier: Tier) -> int:
    """Where in the list of tiers `tier` is; behind all of them if it is the disk."""
    return next((index for index, cache in enumerate(caches) if cache.tier is tier), len(caches))


def nearest(key: ExpertKey, slower: Sequence[ExpertCache]) -> Tier:
    """The first of the slower tiers that has the bytes; the disk has them all."""
    return next((cache.tier for cache in slower if cache.state(key) is State.RESIDENT), Tier.DISK)
