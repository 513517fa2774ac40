"""How each member of an event is served: at which precision, by another expert, or not at all. Torch-free.

An event first asks at which precision each member should be. The fallback decides about those that the computing tier
does not hold so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np

from cache.errors import PolicyError
from cache.residency import ExpertCache, State
from cache.stats import TierStats
from cache.traces.by_token import ByToken, Mask, Routed
from cache.types import ExpertKey, RoutingEvent
from offload.decide.fallbacks.base import SKIP, Candidate, Choice, Fallback
from offload.decide.fetching import urgency
from offload.decide.pace import Pace
from offload.decide.plan import LayerPlan
from offload.decide.stacks import Stacks

_WHOLE = (0,)
"""The slices of a plain expert."""

Asked = list[tuple[ExpertKey, int]]
"""Members that the computing tier does not hold at their target, with that target, in touch order."""


class Serving:
    """Asks `fallback`; without one, every member is served at the best precision.

    Super experts are always served at their target. `pace` says how long transfers take.
    """

    def __init__(
        self, stacks: Stacks, fallback: Fallback | None, super_experts: Collection[ExpertKey], pace: Pace
    ) -> None:
        self.fallback = fallback
        self.super_experts = frozenset(super_experts)
        self.uses = [0] * len(stacks.precisions)
        """Expert uses at each precision, since the start or `reset`."""
        self.skipped = 0
        """Experts that were left out."""
        self.replaced = 0
        """Expert uses that went to another expert than the router's choice; not counted in `uses`."""
        self.routed = self.dropped = 0
        """Pairs of a token and an expert that routers chose, and those dropped before their event; 0 where no fallback
        may drop any."""
        self._lossy = fallback is not None and fallback.lossy
        self._gates = fallback is not None and fallback.gates
        self._stacks = stacks
        self._pace = pace
        self._held: list[tuple[ExpertCache, ExpertKey]] = []  # pinned for this event

    @property
    def dropped_share(self) -> float:
        """Of the pairs of a token and an expert that routers chose, those that were dropped."""
        return self.dropped / self.routed if self.routed else 0.0

    @property
    def by_token(self) -> ByToken | None:
        """What the fallback asks of each token before its event; None for nothing."""
        fallback = self.fallback
        if fallback is None or not (fallback.gates or fallback.by_token):
            return None
        return ByToken(self._keep if fallback.gates else None, fallback.by_token, fallback.renormalises)

    def target(self, key: ExpertKey) -> int:
        """The precision that an expert should have."""
        if self.fallback is None or key in self.super_experts:
            return 0
        return self.fallback.target(key)

    def look_up(self, plan: LayerPlan, stats: TierStats) -> Asked:
        """Note in `plan` the members that are resident at their target; count hits, late hits and misses. Gives the
        others."""
        stacks = self._stacks
        if stacks.plain:
            plan.resident, awaited, missing = stacks.caches[0].look_up(plan.keys)
            stats.hits += len(plan.resident)
            stats.late_hits += len(awaited)
            stats.misses += len(missing)
            if not (missing or awaited):
                return []
            if not self._lossy:
                plan.awaited = awaited
                plan.waiting = dict.fromkeys([*awaited, *missing] if awaited else missing, _WHOLE)
                return []
            return [(key, 0) for key in plan.keys if key not in plan.resident]
        asked: Asked = []
        for key, target in zip(plan.keys, self._targets(plan.event), strict=True):
            state = stacks.state(key, target)
            if state is State.RESIDENT:
                stats.hits += 1
                plan.resident.append(key)
                if target:
                    plan.precisions[key] = target
                continue
            if state is State.PENDING:
                stats.late_hits += 1
            else:
                stats.misses += 1
            asked.append((key, target))
        return asked

    def choose(self, plan: LayerPlan, asked: Asked) -> None:
        """Decide how each of the `asked` members is served, and note it. Raises PolicyError, and what a fallback
        raises."""
        open_ = [(key, target) for key, target in asked if key not in self.super_experts] if self._lossy else []
        chosen = dict(zip((key for key, _ in open_), self._choices(plan.event, open_), strict=True)) if open_ else {}
        for key, target in asked:
            self._take(plan, key, target, chosen.get(key) or Choice(target))

    def order(self, plan: LayerPlan) -> list[ExpertKey]:
        """The members in the order in which to fetch them."""
        return urgency(plan, self.fallback.hotness if self.fallback is not None and self._lossy else None)

    def hold(self, plan: LayerPlan) -> None:
        """Keep what the computing tier holds of members that wait for other slices: nothing takes its place before they
        have been computed."""
        for key, waits in plan.waiting.items():
            if key not in plan.on_cpu:
                for slice_ in self._stacks.precisions[plan.precision(key)]:
                    if slice_ not in waits:
                        self._hold(key, slice_)

    def count(self, plan: LayerPlan) -> None:
        """The event is planned: count how its members are served."""
        if self._gates:
            self.routed += sum(plan.event.tokens) + plan.event.dropped
            self.dropped += plan.event.dropped
        if not (plan.precisions or plan.skipped or plan.replaced):
            self.uses[0] += len(plan.event.experts)
            return
        self.skipped += len(plan.skipped)
        self.replaced += len(plan.replaced)
        for key in plan.keys:
            if plan.uses(key):
                self.uses[plan.precision(key)] += 1

    def rerouted(self, count: int) -> None:
        """So many experts of the event to come are there because they are resident, not by the router's choice."""
        self.replaced += count
        self.uses[0] -= count

    def release(self) -> None:
        """The event is over: what it used may be evicted again, super experts excepted."""
        if self._held:
            for cache, key in self._held:
                cache.unpin(key)
            self._held.clear()

    def forget(self) -> None:
        """The caches start over, and with them what was kept for the event."""
        self._held.clear()

    def reset(self) -> None:
        """Count from zero."""
        self.uses = [0] * len(self.uses)
        self.skipped = self.replaced = self.routed = self.dropped = 0

    def _targets(self, event: RoutingEvent) -> Sequence[int]:
        """The precision that each member should have."""
        if self.fallback is None:
            return [0] * len(event.experts)
        targets = self.fallback.targets(event)
        if not self.super_experts:
            return targets
        return [0 if key in self.super_experts else t for key, t in zip(event.keys, targets, strict=True)]

    def _choices(self, event: RoutingEvent, asked: Asked) -> list[Choice]:
        assert self.fallback is not None
        weights = dict(zip(event.keys, event.weights, strict=True))
        total = sum(event.weights) or 1.0
        before = dict(zip(event.keys, event.before or _before(event.weights, total), strict=True))
        stand_ins = self._stand_ins(event.keys, asked)
        candidates = [
            Candidate(
                key,
                weights[key] / total,
                before[key],
                target,
                self._stacks.best(key, target),
                tuple(self.fetch_s(key, precision) for precision in range(len(self.uses))),
                stand_ins.get(key),
            )
            for key, target in asked
        ]
        resident = len(event.experts) - len(asked)
        choices = self.fallback.choose(event, candidates, resident * self._pace.expert_s.get(event.phase, 0.0))
        self._check(choices, len(asked))
        return choices

    def _keep(self, routed: Routed) -> Mask | None:
        """What the fallback keeps of a pass's tokens, and super experts; None for all. Raises PolicyError."""
        assert self.fallback is not None
        kept = self.fallback.keep(routed)
        if kept.shape != routed.experts.shape or kept.dtype != bool or not kept.any():
            raise PolicyError(
                f"fallback {type(self.fallback).__name__} kept {kept.dtype} {list(kept.shape)} of the experts "
                f"{list(routed.experts.shape)} of a pass: a bool for each, and not all of them False"
            )
        if self.super_experts:
            mine = [expert for layer, expert in self.super_experts if layer == routed.layer]
            kept = kept | np.isin(routed.experts, mine)
        return None if kept.all() else kept

    def _stand_ins(self, keys: Sequence[ExpertKey], asked: Asked) -> dict[ExpertKey, ExpertKey]:
        """A resident expert for each that is missing, where the fallback knows one; the heaviest chooses first."""
        assert self.fallback is not None
        taken = set(keys)
        found: dict[ExpertKey, ExpertKey] = {}
        for key, target in reversed(asked):
            for other in self.fallback.stand_ins(key):
                if other not in taken and self._stacks.state(other, target) is State.RESIDENT:
                    found[key] = other
                    taken.add(other)
                    break
        return found

    def _check(self, choices: Sequence[Choice], asked: int) -> None:
        """Raises PolicyError for what no fallback may say."""
        precisions = len(self.uses)
        wrong = [c.precision for c in choices if not (c.precision == SKIP or 0 <= c.precision < precisions)]
        if wrong or len(choices) != asked:
            what = f"precision {wrong[0]}" if wrong else f"{len(choices)} times"
            raise PolicyError(
                f"fallback {type(self.fallback).__name__} chose {what} for {asked} experts: one choice for each, "
                f"SKIP or a precision from 0 to {precisions - 1}"
            )

    def _take(self, plan: LayerPlan, key: ExpertKey, target: int, choice: Choice) -> None:
        """Note how one member is served, and the slices that it waits for."""
        precision = choice.precision
        if precision != target or choice.instead is not None:
            plan.targets[key] = target
            if choice.later:
                plan.later.append(key)
        if precision == SKIP:
            plan.skipped.append(key)
            return
        if precision:
            plan.precisions[key] = precision
        if choice.instead is not None:
            plan.replaced[key] = choice.instead
            plan.resident.append(key)
            for slice_ in self._stacks.precisions[precision]:
                self._hold(choice.instead, slice_)
            return
        waits = self._stacks.lacking(key, precision)
        if not waits:
            plan.resident.append(key)
            return
        plan.waiting[key] = waits
        if any(self._stacks.by_slice[slice_][0].state(key) is State.PENDING for slice_ in waits):
            plan.awaited.append(key)

    def _hold(self, key: ExpertKey, slice_: int) -> None:
        """Nothing evicts it until the event is over."""
        cache = self._stacks.by_slice[slice_][0]
        cache.pin(key)
        self._held.append((cache, key))

    def fetch_s(self, key: ExpertKey, precision: int) -> float:
        """How long what the computing tier lacks for a precision takes, on the channels that bring it."""
        return sum(
            self._pace.fetch_s.get(self._stacks.source(key, slice_), 0.0) * self._stacks.weight(slice_)
            for slice_ in self._stacks.lacking(key, precision)
        )


def _before(weights: Sequence[float], total: float) -> list[float]:
    """The share that members with more weight have, of members in ascending weight."""
    after = [0.0, *accumulate(weights[::-1])][::-1]  # weight of this and all stronger members
    return [weight / total for weight in after[1:]]
