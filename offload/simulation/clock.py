"""A trace through the live decision loop, under a simulated clock.

`Manager`, caches and policies are those that run live; only the transfer engine is another: it moves a clock by what
the `CostModel` says, in the order in which `offload/engine/transfer.py` and `offload/engine/runtime.py` do things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

from cache.counting.schedule import runs
from cache.stats import TierStats
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent, Tier
from offload.costs.model import CostModel
from offload.decide.manager import Manager
from offload.decide.mixed import MixedManager
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.simulation.clock_mixed import MixedEngine
from offload.simulation.overlap import OverlappingEngine

_REMEMBERED = 4096
"""Kinds of events whose times are remembered."""

Each = Callable[[RoutingEvent, LayerPlan], None]


@dataclass(slots=True)
class PhaseTime:
    """What the forward passes of one phase took."""

    passes: int = 0
    tokens: int = 0
    """Tokens routed, padding included."""
    seconds: float = 0.0
    stall_s: float = 0.0
    """Of these seconds, waiting for experts with nothing else to compute."""

    @property
    def tokens_per_s(self) -> float:
        """0.0 before the first token."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Timeline:
    """A whole replay: time by phase, counters by tier."""

    phases: dict[Phase, PhaseTime] = field(default_factory=lambda: {phase: PhaseTime() for phase in Phase})
    tiers: dict[Tier, TierStats] = field(default_factory=dict)
    bytes_from_disk: int = 0

    @property
    def stall_s(self) -> float:
        """Of both phases."""
        return sum(time.stall_s for time in self.phases.values())

    @property
    def tokens_per_s(self) -> float:
        """Of decoding; of reading prompts where nothing was decoded."""
        return self.phases[Phase.DECODE].tokens_per_s or self.phases[Phase.PREFILL].tokens_per_s


class SimulatedEngine:
    """Times plans as the live transfer engine carries them out, where nothing is fetched outside of events: each starts
    with idle channels.

    The disk and the link are a serial channel each. The processor computes residents first, then what lands, in the
    order of landing; late fetches start when the residents are done. `computing` is the tier that computes.
    """

    def __init__(self, cost: CostModel, computing: Tier) -> None:
        self._cost = cost
        self._computing = computing
        self._nbytes = cost.expert_bytes
        # Decoding, every expert has one token: a few kinds of events make up nearly all of them.
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._event)

    def run(self, plan: LayerPlan, top_k: int) -> tuple[float, float, list[Fetch]]:
        """(seconds, of which stalled, fetches in order of landing) of one event, the layer's dense part included."""
        event = plan.event
        tokens = dict(zip(event.experts, event.tokens, strict=True))
        fetches = [*plan.fetches, *plan.late_fetches]
        landed, seconds, stall_s = self._remembered(
            tuple([tokens[expert] for _, expert in plan.resident]),
            tuple([(fetch.source, tokens[fetch.key.expert]) for fetch in fetches]),
            len(plan.fetches),
        )
        dense_s = self._cost.layer_s(sum(event.tokens) // top_k, len(tokens))
        return dense_s + seconds, stall_s, [fetches[i] for i in landed]

    def event_s(self, tokens: int, top_k: int, hits: int, misses: int, copies: int = 0) -> tuple[float, float]:
        """(seconds, of which stalled) of an event of so many tokens, spread evenly: `copies` of the misses come from
        host memory, the others from the disk."""
        each = max(round(tokens * top_k / (hits + misses)), 1)
        sources = (Tier.CPU,) * copies + (Tier.DISK,) * (misses - copies)
        _, seconds, stall_s = self._event((each,) * hits, tuple((source, each) for source in sources), misses)
        return self._cost.layer_s(tokens, hits + misses) + seconds, stall_s

    def _event(
        self, residents: tuple[int, ...], fetches: tuple[tuple[Tier, int], ...], early: int
    ) -> tuple[list[int], float, float]:
        """(indices of the fetches in order of landing, seconds, stall). All but the first `early` fetches are late.

        Numbers are tokens an expert.
        """
        cost = self._cost
        disk_s = 0.0
        on_host: list[tuple[float, int]] = []  # (when, fetch)

        def read(fetches: Sequence[tuple[Tier, int]], first: int, start_s: float) -> None:
            nonlocal disk_s
            for index, (source, _) in enumerate(fetches, first):
                if source is Tier.DISK:
                    alone = disk_s <= start_s
                    disk_s = max(disk_s, start_s) + cost.read_s(
                        cost.record_bytes, alone=alone, computing=bool(residents)
                    )
                    on_host.append((disk_s, index))
                else:
                    on_host.append((start_s, index))

        read(fetches[:early], 0, 0.0)
        now_s = 0.0
        for tokens in residents:
            now_s += cost.expert_s(self._computing, tokens, reading=now_s < disk_s)
        read(fetches[early:], early, now_s)
        on_host.sort()
        landings = on_host if self._computing is Tier.CPU else self._over_link(on_host)
        stall_s = 0.0
        for landed_s, index in landings:
            if landed_s > now_s:
                stall_s += landed_s - now_s
                now_s = landed_s
            now_s += cost.expert_s(self._computing, fetches[index][1], reading=now_s < disk_s)
        return [index for _, index in landings], now_s, stall_s

    def _over_link(self, on_host: list[tuple[float, int]]) -> list[tuple[float, int]]:
        landings, link_s = [], 0.0
        for ready_s, index in on_host:
            link_s = max(link_s, ready_s) + self._cost.link_s(self._nbytes)
            landings.append((link_s, index))
        return landings


def run_timed(
    trace: Trace,
    manager: Manager,
    cost: CostModel,
    *,
    cold: bool,
    each: Each | None = None,
    compute: Sequence[CostModel] = (),
) -> Timeline:
    """Replay `trace` event by event through `manager`, whose caches start empty; `cold` empties them at every sequence.

    `each` is shown every event and what was decided. `compute` are the costs of computing at each precision of a
    `MixedManager`; by default all take as long as at the model's own. Raises what a policy raises.
    """
    timeline = Timeline()
    for index, (events, future) in enumerate(runs(trace, cold=cold)):
        if index:
            manager.clear()
        for cache in manager.caches:
            if not cache.policy.causal:
                cache.policy.foresee(future)
        if isinstance(manager, MixedManager) or manager.split is not None:
            engine = _overlapping(manager, cost, compute, trace.top_k)
            _run_ahead(events, manager, engine, timeline, trace, each)
            _receive(manager, engine.drain())
        else:
            _run(events, manager, cost, timeline, trace, each)
    timeline.tiers = manager.stats
    timeline.bytes_from_disk = manager.bytes_from_disk
    return timeline


def _overlapping(manager: Manager, cost: CostModel, compute: Sequence[CostModel], top_k: int) -> OverlappingEngine:
    tier = manager.computing.tier
    if isinstance(manager, MixedManager):
        return MixedEngine(cost, compute or [cost] * len(manager.precisions), manager.sizes, tier, top_k)
    return OverlappingEngine(cost, tier, top_k)


def _run(
    events: Iterable[RoutingEvent],
    manager: Manager,
    cost: CostModel,
    timeline: Timeline,
    trace: Trace,
    each: Each | None,
) -> None:
    """Passes for which nothing is fetched ahead and nothing is on its way are timed with idle channels: without a
    prefetcher all, and those of a reply if only its prompt was streamed."""
    computing, top_k = manager.computing.tier, trace.top_k
    alone = SimulatedEngine(cost, computing)
    if manager.prefetcher is None:
        _run_on_demand(events, manager, alone, timeline, top_k, cost.pass_s(), each)
        return
    overlapping = OverlappingEngine(cost, computing, top_k)
    for ahead, some in groupby(events, _fetching_ahead(manager.prefetcher)):
        if ahead:
            _run_ahead(some, manager, overlapping, timeline, trace, each)
        else:
            _run_on_demand(some, manager, alone, timeline, top_k, cost.pass_s(), each)
    _receive(manager, overlapping.drain())


def _fetching_ahead(prefetcher: Prefetcher) -> Callable[[RoutingEvent], bool]:
    """Whether an event belongs to a pass that fetches ahead, or to which transfers are left. Ask in order, in time."""
    ahead = prefetcher.predicts

    def ask(event: RoutingEvent) -> bool:
        nonlocal ahead
        if event.layer == 0:
            ahead = prefetcher.predicts or event.phase is Phase.PREFILL or bool(prefetcher.flights)
        return ahead

    return ask


def _run_on_demand(
    events: Iterable[RoutingEvent],
    manager: Manager,
    engine: SimulatedEngine,
    timeline: Timeline,
    top_k: int,
    pass_s: float,
    each: Each | None,
) -> None:
    """Nothing outlives its event. `pass_s` is what a pass takes beside its layers."""
    for event in events:
        time = timeline.phases[event.phase]
        if event.layer == 0:
            time.passes += 1
            time.tokens += sum(event.tokens) // top_k
            time.seconds += pass_s
        plan = _step(manager, event, each)
        seconds, stall_s, landed = engine.run(plan, top_k)
        time.seconds += seconds
        time.stall_s += stall_s
        _receive(manager, landed)
        manager.finish()


def _run_ahead(
    events: Iterable[RoutingEvent],
    manager: Manager,
    engine: OverlappingEngine,
    timeline: Timeline,
    trace: Trace,
    each: Each | None,
) -> None:
    """With transfers between events, and the pace told after every pass."""
    last_layer = trace.num_layers - 1
    pass_s = 0.0
    for event in events:
        time = timeline.phases[event.phase]
        if event.layer == 0:
            time.passes += 1
            time.tokens += sum(event.tokens) // trace.top_k
            pass_s = engine.begin_pass()
        dense_s, landed = engine.begin(event)
        _receive(manager, landed)
        plan = _step(manager, event, each)
        event_s, stall_s, landed = engine.run(plan, manager.cancelled)
        _receive(manager, landed)
        manager.finish()
        pass_s += dense_s + event_s
        time.stall_s += stall_s
        if event.layer == last_layer:
            time.seconds += pass_s
            manager.passed(engine.end_pass(event, pass_s))


def _step(manager: Manager, event: RoutingEvent, each: Each | None) -> LayerPlan:
    plan = manager.step(event)
    if plan.error is not None:
        raise plan.error
    if each is not None:
        each(event, plan)
    return plan


def _receive(manager: Manager, landed: Iterable[Fetch]) -> None:
    for fetch in landed:
        manager.arrived(fetch, manager.sizes[fetch.slice] if fetch.source is Tier.DISK else 0)
