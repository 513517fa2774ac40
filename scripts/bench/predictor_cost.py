"""What predictors and prefetch rules cost: microseconds of CPU time an event, at two shapes of models.

    python scripts/bench/predictor_cost.py

A predictor is charged for `observe` and `predict`, and learns from a profile where it can. A rule is charged for
planning what to fetch ahead after an event: `transition` predicts as far as the rule looks, a quarter of the experts is
cached for each layer, and what is fetched arrives before the next event. Routing is made up, token by token, and counts
from the second half of the events on, when counts and caches are full. Medians of some repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent, Tier
from offload.decide.manager import Manager
from offload.decide.pace import PassTime
from offload.decide.plan import LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import make_rule, rule_names
from offload.decide.rules import depth_of
from offload.decide.stacks import Stacks
from predictors.base import Predictor, find_predictor, make_predictor, names
from scripts.bench.common import Args, Arguments, Result, in_turn, medians, show
from scripts.bench.routes import habitual

SHAPES = ((24, 32, 4), (48, 128, 8))
"""Layers, experts and top-k."""
DEPTH = 3


@dataclass
class Case:
    """Routing of one shape, to learn from and to follow."""

    profile: Trace
    trace: Trace
    events: list[RoutingEvent]
    trained: dict[str, Predictor] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: int, experts: int, top_k: int, tokens: int) -> Case:
        """Made-up routing."""
        profile, trace = (habitual(layers, experts, top_k, tokens, seed, DEPTH) for seed in (1, 0))
        return cls(profile, trace, list(routing_events(trace)))

    def predictor(self, name: str) -> Predictor:
        """What it has learned, and nothing that it has seen since; learning takes minutes, and is done once."""
        if name not in self.trained:
            known = self.profile if find_predictor(name).causal else self.trace
            self.trained[name] = make_predictor(name, known.num_layers, known.num_experts, known)
        self.trained[name].reset()
        return self.trained[name]

    @property
    def name(self) -> str:
        """The column of a table."""
        return f"{self.trace.num_layers} x {self.trace.num_experts} top-{self.trace.top_k}"


def benchmark(args: Args) -> Result:
    """All predictors and all rules, in turn, at each shape."""
    cases = [Case.of(*shape, args.tokens) for shape in SHAPES]
    found = {}
    for kind, cost, chosen in (("predictor", of_predictor, args.predictors), ("rule", of_rule, args.rules)):
        rows = in_turn(chosen, args.repetitions, each(cost, cases))
        found[kind] = {name: medians(own) for name, own in rows.items()}
        show(found[kind], f"microseconds an event, by {kind}")
    return {"microseconds_an_event": found}


def each(cost: Callable[[str, Case], float], cases: list[Case]) -> Callable[[str, int], Result]:
    """A row of what one part costs in each case."""
    return lambda name, _: {case.name: cost(name, case) for case in cases}


def of_predictor(name: str, case: Case) -> float:
    """Microseconds of what it does for one event."""
    predictor = case.predictor(name)
    first, second = halves(case.events)
    for event in first:
        predictor.observe(event)
        predictor.predict(DEPTH)
    began = time.process_time()
    for event in second:
        predictor.observe(event)
        predictor.predict(DEPTH)
    return 1e6 * (time.process_time() - began) / len(second)


class Timed(Prefetcher):
    """A prefetcher that knows how long its plans took."""

    seconds = 0.0

    def plan(self, *arguments: object) -> None:
        """Plan, and add the time to `seconds`."""
        began = time.process_time()
        super().plan(*arguments)  # type: ignore[arg-type]
        self.seconds += time.process_time() - began


def of_rule(name: str, case: Case) -> float:
    """Microseconds of its plan for one event."""
    layers, experts = case.trace.num_layers, case.trace.num_experts
    rule = make_rule(name)
    prefetcher = Timed(case.predictor("transition"), depth_of(rule, None, layers), rule, adaptive=False)
    policy = make_policy("lru", Lanes.per_layer(layers, experts, experts // 4))
    caches = [ExpertCache(Tier.CPU, policy.lanes.slots.tolist(), policy)]
    manager = Manager(Stacks.single(caches, 1), prefetcher=prefetcher)
    # An expert computes in 0.1 ms and is fetched in 0.3, a layer's dense part takes 1.
    manager.passed(PassTime(Phase.DECODE, 1.1e-3, 1e-4, 0.0, 1, 1.0, 1.0, 3e-4, 0.0, 0.0))
    first, second = halves(case.events)
    for event in first:
        carry_out(manager.step(event), manager)
    prefetcher.seconds = 0.0
    for event in second:
        carry_out(manager.step(event), manager)
    return 1e6 * prefetcher.seconds / len(second)


def carry_out(plan: LayerPlan, manager: Manager) -> None:
    """Let everything that was planned happen at once."""
    if plan.error is not None:
        raise plan.error
    for fetch in (*plan.fetches, *plan.late_fetches, *plan.prefetches):
        manager.arrived(fetch, 1)
    manager.finish()


def halves(events: list[RoutingEvent]) -> Iterable[list[RoutingEvent]]:
    """The events before the middle, and those after it."""
    return events[: len(events) // 2], events[len(events) // 2 :]


if __name__ == "__main__":
    arguments = Arguments(__doc__, tokens=200, repetitions=5)
    arguments.option("--predictors", [name for name in names() if name != "none"], "names")
    arguments.option("--rules", list(rule_names()), "names")
    raise SystemExit(arguments.run(benchmark))
