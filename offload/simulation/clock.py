"""A trace through the live decision loop, under a simulated clock.

`Manager`, caches and policies are those that run live; only the transfer engine is another: it moves a clock by what
the `CostModel` says (`offload/simulation/engine.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cache.counting.schedule import runs, warm_up_passes
from cache.stats import TierStats
from cache.traces.trace import Trace
from cache.types import ExpertKey, Phase, RoutingEvent, Tier, before_first
from offload.costs.model import CostModel
from offload.decide.manager import Manager
from offload.decide.plan import Fetch, LayerPlan
from offload.simulation.engine import SimulatedEngine

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

    def restart(self) -> None:
        """Count from zero."""
        self.phases.update((phase, PhaseTime()) for phase in Phase)

    @property
    def stall_s(self) -> float:
        """Of both phases."""
        return sum(time.stall_s for time in self.phases.values())

    @property
    def tokens_per_s(self) -> float:
        """Of decoding; of reading prompts where nothing was decoded."""
        return self.phases[Phase.DECODE].tokens_per_s or self.phases[Phase.PREFILL].tokens_per_s


def run_timed(
    trace: Trace,
    manager: Manager,
    cost: CostModel,
    *,
    cold: bool,
    warm_up: int = 0,
    each: Each | None = None,
    compute: Sequence[CostModel] = (),
    placed: Sequence[ExpertKey] = (),
) -> Timeline:
    """Replay `trace` event by event through `manager`, whose caches start empty; `cold` empties them at every sequence.
    Otherwise the first `warm_up` sequences are not counted.

    `placed` are experts that are in memory at the start, each time, the most important first.
    `each` is shown every event and what was decided. `compute` are the costs of computing at each precision, where
    there are several; by default all take as long as at the model's own. Raises what a policy raises, and TraceError
    where `warm_up` leaves nothing to count.
    """
    if warm_up and cold:
        raise ValueError("a cold replay has no warm-up")
    skipped = warm_up_passes(trace, warm_up)
    timeline = Timeline()
    stacks = manager.stacks
    computing = compute or [cost] * len(stacks.precisions)
    for index, (events, future) in enumerate(runs(trace, cold=cold, by_token=manager.serving.by_token)):
        if index:
            manager.clear()
        for fetch in manager.place(placed):  # which takes no time
            for tier in fetch.admitted:
                stacks.cache(tier, fetch.slice).commit(fetch.key)
        for cache in stacks.caches:
            if not cache.policy.causal:
                cache.policy.foresee(future)
        engine = SimulatedEngine(
            cost,
            stacks.computing,
            trace.top_k,
            compute=computing,
            sizes=stacks.sizes,
        )
        _run(events, manager, engine, timeline, trace, each, skipped)
        _receive(manager, engine.drain())
    timeline.tiers = manager.stats
    timeline.bytes_from_disk = manager.bytes_from_disk
    return timeline


def _run(
    events: Iterable[RoutingEvent],
    manager: Manager,
    engine: SimulatedEngine,
    timeline: Timeline,
    trace: Trace,
    each: Each | None,
    skipped: int,
) -> None:
    """Event by event; the manager is told of every pass where its time went. The first `skipped` are not counted."""
    last_layer, top_k, phases = trace.num_layers - 1, trace.top_k, timeline.phases
    pass_s = 0.0
    for event in events:
        if skipped and event.layer == 0 and sum(time.passes for time in phases.values()) == skipped:
            skipped = 0
            timeline.restart()
            manager.reset_stats()
        time = phases[event.phase]
        if event.layer == 0:
            if event.opening is not None and manager.listens:
                _open(before_first(event.sequence, event.step, event.phase, event.opening), manager, engine)
            time.passes += 1
            time.tokens += (sum(event.tokens) + event.dropped) // top_k
            pass_s = engine.begin_pass()
        dense_s, landed = engine.begin(event)
        if landed:
            _receive(manager, landed)
        plan = manager.step(event)
        if plan.error is not None:
            raise plan.error
        if each is not None:
            each(event, plan)
        event_s, stall_s, landed = engine.run(plan, manager.cancelled)
        if landed:
            _receive(manager, landed)
        manager.finish()
        pass_s += dense_s + event_s
        time.stall_s += stall_s
        if event.layer == last_layer:
            time.seconds += pass_s
            manager.passed(engine.end_pass(event, pass_s))


def _open(event: RoutingEvent, manager: Manager, engine: SimulatedEngine) -> None:
    """A pass begins: what is fetched ahead before its first layer is on its way."""
    plan = manager.begin(event)
    if plan.error is not None:
        raise plan.error
    if plan.prefetches or plan.cancelled:
        engine.run(plan, manager.cancelled)


def _receive(manager: Manager, landed: Iterable[Fetch]) -> None:
    sizes = manager.stacks.sizes
    for fetch in landed:
        manager.arrived(fetch, sizes[fetch.slice] if fetch.source is Tier.DISK else 0)
