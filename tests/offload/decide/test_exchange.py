"""What a policy exchanges is fetched behind everything else, when the event that made it due is over."""

from __future__ import annotations

import by_hand
import one_precision
from one_precision import LAYERS, SLOT, K

from cache.residency import State
from cache.types import Tier
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.decide.schedulers.base import make_scheduler
from offload.decide.split import Split

POLICY = "dali(w_size=3, u_size=1)"
CPU_FIRST = SplitCosts(gpu_s=lambda n: 1.0, cpu_s=lambda n: 1.0, copy_s=9.0, read_s=9.0, cpu_start_s=0.0)


def warm(policy: str = POLICY) -> Manager:
    """A GPU with two places, both of layer 0's experts 0 and 1; RAM has room for all; the CPU computes what is
    missing."""
    manager = one_precision.manager_of(2, 24, policy=policy)
    one_precision.run(manager, by_hand.event(0, [0, 1]))
    manager.split = Split(make_scheduler("cpu-only"), CPU_FIRST)
    return manager


def run(manager: Manager, layer: int, *experts: int, step: int) -> LayerPlan:
    """One event; everything on demand arrives, and what is fetched behind it is left to the test."""
    plan = manager.step(by_hand.event(layer, list(experts), step))
    assert plan.error is None
    for fetch in (*plan.fetches, *plan.late_fetches):
        manager.arrived(fetch, SLOT if fetch.source is Tier.DISK else 0)
    manager.finish()
    return plan


def passes(manager: Manager) -> list[LayerPlan]:
    """Two more passes in which layer 0 uses 5, and 0; all plans."""
    return [run(manager, layer, *([0, 5] if layer == 0 else [7]), step=s) for s in (1, 2) for layer in range(LAYERS)]


def test_the_next_event_fetches_it_from_memory_for_the_idlest() -> None:
    manager = warm()
    plans = passes(manager)
    assert manager.computing.state(K(0, 1)) is State.MISS
    (carrier,) = [plan for plan in plans if plan.prefetches]
    assert (carrier.event.step, carrier.event.layer) == (2, 1)  # the one after the third of layer 0
    (fetch,) = carrier.prefetches
    assert (fetch.key, fetch.source, fetch.admitted) == (K(0, 5), Tier.CPU, (Tier.GPU,))
    assert fetch.evicted == {Tier.GPU: [K(0, 1)]}
    assert carrier.on_cpu == [K(1, 7)] and not any(f.source is Tier.CPU for f in carrier.fetches)
    # Until it has crossed the link, its copy in memory stays.
    cache = manager.stacks.cache(Tier.CPU)
    assert cache.pinned() == [K(0, 5)]
    before = manager.stats[Tier.GPU].bytes_in
    manager.arrived(fetch, 0)
    assert manager.stats[Tier.GPU].bytes_in == before + SLOT
    assert cache.pinned() == [] and manager.computing.state(K(0, 5)) is State.RESIDENT
    assert run(manager, 0, 5, step=3).resident == [K(0, 5)]
    manager.check_integrity()


def test_a_policy_that_exchanges_nothing_leaves_it_on_the_cpu() -> None:
    for policy in ("lru", "dali(w_size=9, u_size=1)"):
        manager = warm(policy)
        assert not any(plan.prefetches for plan in passes(manager))
        assert run(manager, 0, 5, step=3).on_cpu == [K(0, 5)]


def test_what_was_due_is_forgotten_with_all_else() -> None:
    manager = warm()
    for step in (1, 2):
        run(manager, 0, 0, 5, step=step)
    assert manager.computing.policy.exchange()
    manager.clear()
    assert not run(manager, 1, 7, step=0).prefetches


def test_an_exchange_that_fails_gives_its_place_back() -> None:
    manager = warm()
    (fetch,) = [fetch for plan in passes(manager) for fetch in plan.prefetches]
    manager.failed(fetch)
    assert manager.computing.state(K(0, 5)) is State.MISS
    manager.check_integrity()
