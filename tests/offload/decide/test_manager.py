"""The decision loop by hand: what is a hit, what is fetched from where, and what goes to make room."""

from __future__ import annotations

from typing import Any

import by_hand
import numpy as np
import pytest
from one_precision import EXPERTS, LAYERS, SLOT, K, manager_of, run

from cache.lanes import Lanes
from cache.policies.lru import LRU
from cache.residency import ExpertCache, State
from cache.stats import TierStats
from cache.types import Tier
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks


def counts(manager: Manager, tier: Tier) -> dict[str, int]:
    """What is not zero."""
    stats = manager.stats[tier]
    names = ("hits", "late_hits", "misses", "bypasses", "evictions", "bytes_in")
    return {name: value for name in names if (value := getattr(stats, name))}


def test_one_tier() -> None:
    manager = manager_of(2)
    assert run(manager, by_hand.event(0, [0, 1])).resident == []
    assert counts(manager, Tier.CPU) == {"misses": 2, "bytes_in": 2 * SLOT}

    plan = run(manager, by_hand.event(0, [1, 2]))  # 0 goes: 1 is needed now
    assert plan.resident == [K(0, 1)]
    (fetch,) = plan.fetches
    assert (fetch.key, fetch.source, fetch.admitted, fetch.evicted) == (
        K(0, 2), Tier.DISK, (Tier.CPU,), {Tier.CPU: [K(0, 0)]}
    )  # fmt: skip
    assert counts(manager, Tier.CPU) == {"hits": 1, "misses": 3, "evictions": 1, "bytes_in": 3 * SLOT}
    assert manager.bytes_from_disk == 3 * SLOT

    plan = run(manager, by_hand.event(1, [0, 1, 2]))  # one more than fits: the lightest is not kept
    assert [(f.key.expert, f.admitted) for f in plan.fetches] == [(2, (Tier.CPU,)), (1, (Tier.CPU,)), (0, ())]
    assert counts(manager, Tier.CPU) == {
        "hits": 1, "misses": 6, "bypasses": 1, "evictions": 3, "bytes_in": 6 * SLOT
    }  # fmt: skip
    assert manager.stats[Tier.CPU].hit_rate == 1 / 7


def test_two_tiers() -> None:
    manager = manager_of(1, 3)
    plan = run(manager, by_hand.event(0, [0, 1]))
    # The GPU has room for one, RAM for both.
    assert [(f.source, f.admitted) for f in plan.fetches] == [
        (Tier.DISK, (Tier.GPU, Tier.CPU)),
        (Tier.DISK, (Tier.CPU,)),
    ]
    assert plan.fetches[0].key == K(0, 1) and manager.caches[0].resident() == [K(0, 1)]
    assert counts(manager, Tier.GPU) == {"misses": 2, "bypasses": 1, "bytes_in": 2 * SLOT}
    assert counts(manager, Tier.CPU) == {"misses": 2, "bytes_in": 2 * SLOT}
    assert manager.bytes_from_disk == 2 * SLOT

    plan = run(manager, by_hand.event(0, [0]))  # RAM has it: no disk
    (fetch,) = plan.fetches
    assert (fetch.source, fetch.admitted, fetch.evicted) == (Tier.CPU, (Tier.GPU,), {Tier.GPU: [K(0, 1)]})
    assert counts(manager, Tier.GPU) == {"misses": 3, "bypasses": 1, "evictions": 1, "bytes_in": 3 * SLOT}
    assert counts(manager, Tier.CPU) == {"hits": 1, "misses": 2, "bytes_in": 2 * SLOT}
    assert manager.bytes_from_disk == 2 * SLOT

    plan = run(manager, by_hand.event(0, [0]))  # the GPU has it: RAM is not asked
    assert plan.resident == [K(0, 0)] and plan.fetches == []
    assert counts(manager, Tier.GPU)["hits"] == 1 and counts(manager, Tier.CPU)["hits"] == 1

    plan = run(manager, by_hand.event(1, [5, 0, 1]))
    # RAM streams none of these three, the GPU two; each tier evicts by itself.
    assert counts(manager, Tier.GPU) == {
        "hits": 1, "misses": 6, "bypasses": 3, "evictions": 2, "bytes_in": 6 * SLOT
    }  # fmt: skip
    assert counts(manager, Tier.CPU) == {"hits": 1, "misses": 5, "evictions": 2, "bytes_in": 5 * SLOT}


def test_what_the_fast_tier_streams_may_come_from_ram() -> None:
    manager = manager_of(0, 4)
    run(manager, by_hand.event(0, [0, 1]))
    plan = run(manager, by_hand.event(0, [0, 1]))
    assert [(f.source, f.admitted) for f in plan.fetches] == [(Tier.CPU, ())] * 2
    assert counts(manager, Tier.GPU) == {"misses": 4, "bypasses": 4, "bytes_in": 4 * SLOT}
    assert counts(manager, Tier.CPU) == {"hits": 2, "misses": 2, "bytes_in": 2 * SLOT}


@pytest.mark.parametrize("slots", [(0,), (0, 0)])
def test_without_room_everything_is_streamed(slots: tuple[int, ...]) -> None:
    manager = manager_of(*slots)
    for _ in range(2):
        plan = run(manager, by_hand.event(0, [3, 4, 5]))
        assert (
            plan.resident == []
            and [(f.source, f.admitted, f.evicted) for f in plan.fetches] == [(Tier.DISK, (), {})] * 3
        )
    for tier in manager.stats:
        assert counts(manager, tier) == {"misses": 6, "bypasses": 6, "bytes_in": 6 * SLOT}


def test_most_tokens_are_fetched_first_and_the_heaviest_are_kept() -> None:
    manager = manager_of(2)
    event = by_hand.event(0, [6, 1, 4, 3], weights=[0.1, 0.2, 0.3, 0.4], tokens=[2, 1, 9, 2])
    plan = manager.step(event)
    assert [f.key.expert for f in plan.fetches] == [4, 3, 6, 1]
    assert [bool(f.admitted) for f in plan.fetches] == [True, True, False, False]


def test_a_member_gives_its_place_up_only_after_its_use() -> None:
    manager = manager_of(2)
    run(manager, by_hand.event(0, [0, 1]))
    plan = manager.step(by_hand.event(0, [0, 2, 1, 3]))  # 1 and 3 are the heaviest: 0 goes, once it has been computed
    assert plan.resident == [K(0, 0), K(0, 1)]
    assert [(f.key, f.admitted, f.evicted) for f in plan.fetches] == [(K(0, 2), (), {})]
    assert [(f.key, f.admitted, f.evicted) for f in plan.late_fetches] == [
        (K(0, 3), (Tier.CPU,), {Tier.CPU: [K(0, 0)]})
    ]
    for fetch in (*plan.fetches, *plan.late_fetches):
        manager.arrived(fetch, SLOT)
    manager.finish()
    manager.check_integrity()
    assert set(manager.caches[0].resident()) == {K(0, 1), K(0, 3)}
    assert counts(manager, Tier.CPU) == {"hits": 2, "misses": 4, "bypasses": 1, "evictions": 1, "bytes_in": 4 * SLOT}


def test_a_policy_that_bypasses_keeps_what_outranks() -> None:
    class LowIds(LRU):
        bypass = True

        def priorities(self, lanes: slice) -> Any:
            return -np.arange(self.lanes.width)[None]

    manager = Manager(Stacks.single([ExpertCache(Tier.CPU, [2 * SLOT], LowIds(Lanes.shared(LAYERS, EXPERTS)))], SLOT))
    run(manager, by_hand.event(0, [3, 5]))
    plan = run(manager, by_hand.event(0, [7, 3]))  # 7 is worth less than what is there
    assert [(f.key, f.admitted) for f in plan.fetches] == [(K(0, 7), ())]
    plan = run(manager, by_hand.event(0, [1, 5]))  # 5 is used, and then gives its place to 1
    assert plan.fetches == [] and [f.evicted for f in plan.late_fetches] == [{Tier.CPU: [K(0, 5)]}]
    assert set(manager.computing.resident()) == {K(0, 1), K(0, 3)}


def test_ram_keeps_what_the_gpu_is_being_given_from_it() -> None:
    manager = manager_of(1, 1)
    run(manager, by_hand.event(0, [0]))
    run(manager, by_hand.event(1, []))
    manager.caches[0].reserve(K(1, 0), SLOT)  # pushes 0 out, and then does not come
    manager.caches[0].abort(K(1, 0))
    plan = run(manager, by_hand.event(0, [0, 1]))  # 1 may not push 0 out of RAM while 0 is on its way from there
    sources = {f.key.expert: (f.source, f.admitted) for f in plan.fetches}
    assert sources[0][0] is Tier.CPU and Tier.CPU not in sources[1][1]
    assert manager.caches[1].resident() == [K(0, 0)]


def test_a_failed_transfer_gives_its_places_back() -> None:
    manager = manager_of(1, 2)
    plan = manager.step(by_hand.event(0, [0, 1]))
    for fetch in plan.fetches:
        assert all(cache.state(fetch.key) is State.PENDING for cache in manager.caches if cache.tier in fetch.admitted)
        manager.failed(fetch)
    manager.finish()
    manager.check_integrity()
    assert [sum(cache.used) for cache in manager.caches] == [0, 0]
    assert manager.bytes_from_disk == 0
    plan = run(manager, by_hand.event(0, [0, 1]))
    assert [f.source for f in plan.fetches] == [Tier.DISK] * 2  # it is tried again
    assert len(manager.caches[0].resident()) == 1 and len(manager.caches[1].resident()) == 2


def test_what_an_event_uses_stays_until_it_is_over() -> None:
    manager = manager_of(2)
    plan = manager.step(by_hand.event(0, [0, 1]))
    manager.arrived(plan.fetches[0], SLOT)
    with pytest.raises(RuntimeError, match="not idle"):
        manager.check_integrity()
    assert manager.computing.evictable_bytes() == 0
    manager.arrived(plan.fetches[1], SLOT)
    manager.finish()
    assert manager.computing.evictable_bytes() == 2 * SLOT
    manager.check_integrity()


def test_reset_stats_keeps_the_caches() -> None:
    manager = manager_of(1, 2)
    run(manager, by_hand.event(0, [0, 1]))
    manager.reset_stats()
    assert all(stats == TierStats() for stats in manager.stats.values()) and manager.bytes_from_disk == 0
    assert [cache.peak_bytes for cache in manager.caches] == [SLOT, 2 * SLOT]
    assert run(manager, by_hand.event(0, [1])).resident == [K(0, 1)]
