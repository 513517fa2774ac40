"""Whichever is best, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.errors import PolicyError
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, find_scheduler, make_scheduler, register


@dataclass(frozen=True)
class Params:
    """`rules`: the schedulers to choose from, the first of equals: what is nearest the optimum where experts are of one
    size (docs/scheduling.md). `margin`: the share of the running rule's makespan that another one must save to take its
    place."""

    rules: tuple[str, ...] = ("hybrimoe", "dali", "ratio", "cpu-only", "gpu-only")
    margin: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.rules, str) or not self.rules or not 0 <= self.margin < 1:
            raise ValueError(f"rules is {self.rules!r}, a tuple of names is needed; margin is {self.margin}, in [0, 1)")


@register
class Auto(Scheduler):
    """Each event is simulated under every rule. The best one runs until another is better by more than a margin: what
    moves with a change, what is cached and who is warmed up, is not in the simulation. Ours.
    """

    name = "auto"
    Params = Params

    def __init__(self, params: Any = None) -> None:
        chosen = Params() if params is None else params
        for spec in chosen.rules:
            if issubclass(find_scheduler(spec), Auto):
                raise PolicyError("auto cannot be one of its own rules: leave it out")
        self.rules = [make_scheduler(spec) for spec in chosen.rules]
        super().__init__(chosen)

    def reset(self) -> None:
        for rule in self.rules:
            rule.reset()
        self.running: Scheduler | None = None

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        found = [(rule, rule.assign(loads, costs)) for rule in self.rules]
        rule, best = min(found, key=lambda pair: pair[1].makespan_s)
        running = next((assignment for rule, assignment in found if rule is self.running), None)
        if running is not None and best.makespan_s >= (1 - self.params.margin) * running.makespan_s:
            return running
        self.running = rule
        return best
