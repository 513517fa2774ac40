"""A log of decisions comes out the same again, from a manager in the state that the first one began in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.types import ExpertKey, Tier
from offload.decide.fallbacks.base import make_fallback
from offload.decide.log import Decision
from offload.decide.manager import Manager
from offload.decide.plan import Fetch
from offload.decide.rules import Rules
from offload.decide.stacks import Stacks


def first_difference(log: Sequence[Decision], manager: Manager) -> int | None:
    """Replay `log` through `manager`, in the state that the logged one began in, with the completions as recorded.

    The index of the first event for which it decides otherwise; None if there is none.
    """
    fetches: dict[tuple[ExpertKey, int], Fetch] = {}
    for index, decision in enumerate(log):
        plan = (manager.begin if decision.event.layer < 0 else manager.step)(decision.event)
        if not same(Decision.of(plan), decision):
            return index
        begun = (*plan.fetches, *plan.late_fetches, *plan.prefetches)
        fetches |= {(fetch.key, fetch.slice): fetch for fetch in begun}
        for key, slice_, arrived in decision.completions:
            fetch = fetches.pop((key, slice_))
            if arrived:
                manager.arrived(fetch, manager.stacks.sizes[slice_] if fetch.source is Tier.DISK else 0)
            else:
                manager.failed(fetch)
        manager.finish()
        if decision.passed is not None:
            manager.passed(decision.passed)
    return None


def same(one: Decision, other: Decision) -> bool:
    """Whether the same event led to the same plan."""

    def planned(decision: Decision) -> tuple[object, ...]:
        named = (each.name for each in fields(decision) if each.name not in ("event", "completions", "passed"))
        event = decision.event._replace(scores=None, opening=None)
        return (event, *(getattr(decision, name) for name in named))

    return planned(one) == planned(other)


def twin(manager: Manager, rules: Rules, fallback: str | None = None) -> Manager:
    """A manager in the state that `manager`, which has seen no event yet or has forgotten all, began in, decided by the
    same `rules` and `fallback`."""
    stacks: list[list[ExpertCache]] = []
    for caches in manager.stacks.by_slice:
        stacks.append([])
        for cache in caches:
            lanes = cache.policy.lanes
            fresh = Lanes(lanes.num_layers, lanes.layers, lanes.experts, lanes.slots)
            stacks[-1].append(ExpertCache(cache.tier, cache.capacities, make_policy(rules.policy, fresh)))
    shape = lanes.num_layers, lanes.experts
    sizes, precisions = manager.stacks.sizes, manager.stacks.precisions
    made = None
    if fallback is not None:
        made = make_fallback(fallback, *shape, len(precisions))
        assert manager.serving.fallback is not None
        made.learn(manager.serving.fallback.sensitivity)
    again = Manager(
        Stacks(stacks, sizes, precisions),
        fallback=made,
        quota=rules.make_quota(*shape),
        super_experts=manager.serving.super_experts,
    )
    decide_by(again, manager, rules)
    return again


def decide_by(again: Manager, manager: Manager, rules: Rules) -> None:
    """From now on `again` decides by `rules`, as `manager`, which does so already."""
    lanes = again.caches[0].policy.lanes
    shape = lanes.num_layers, lanes.experts
    for cache in again.stacks.caches:
        cache.favour(())
        cache.rank(None)
    again.prefetcher = rules.make_prefetcher(*shape)
    again.prefill = rules.make_prefill(*shape)
    again.split = None if manager.split is None else rules.make_split(manager.split.measured)


def hold(again: Manager, manager: Manager) -> None:
    """Let `again` hold what `manager` was given before its first event."""
    for mine, theirs, nbytes in zip(again.stacks.by_slice, manager.stacks.by_slice, again.stacks.sizes, strict=True):
        for cache, other in zip(mine, theirs, strict=True):
            for key in other.resident():
                cache.reserve(key, nbytes)
                cache.commit(key)
