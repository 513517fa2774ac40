"""Reading prompts: what is kept, and what is fetched ahead of its routing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import by_hand
import pytest
from logs import first_difference

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.manager import Manager
from offload.decide.pace import PassTime
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.prefill import Prefill
from offload.decide.stacks import Stacks
from predictors.base import make_predictor

SLOT = 10


def manager_of(
    layers: int, experts: int, slots: Sequence[int], *, way: str = "streamed", policy: str = "lru", pool: str = "global"
) -> Manager:
    """With room for so many experts in each tier, from the one that computes."""
    tiers = [Tier.CPU] if len(slots) == 1 else [Tier.GPU, Tier.CPU]
    caches = []
    for tier, count in zip(tiers, slots, strict=True):
        if pool == "global":
            lanes = Lanes.shared(layers, experts, count)
        else:
            lanes = Lanes.per_layer(layers, experts, count // layers)
        caches.append(ExpertCache(tier, [int(n) * SLOT for n in lanes.slots], make_policy(policy, lanes)))
    prefetcher = Prefetcher(make_predictor("none", layers, experts), 1, adaptive=False)
    return Manager(
        Stacks.single(caches, SLOT),
        prefetcher=prefetcher if way == "streamed" else None,
        prefill=None if way == "on-demand" else Prefill(layers, experts, streams=way == "streamed"),
    )


def chunk_event(layer: int, tokens: Sequence[int], step: int = 0, sequence: int = 1) -> RoutingEvent:
    """A chunk of a prompt, of which so many tokens go to each expert of a layer."""
    members = sorted((count, expert) for expert, count in enumerate(tokens) if count)
    counts = tuple(count for count, _ in members)
    return RoutingEvent(
        sequence, step, layer, Phase.PREFILL, tuple(e for _, e in members), tuple(map(float, counts)), counts
    )


def carry_out(manager: Manager, event: RoutingEvent, flying: dict[ExpertKey, Fetch] | None = None) -> LayerPlan:
    """One event, everything that it waits for landed at once. What is fetched ahead stays in `flying`, or lands too."""
    plan = manager.step(event)
    assert plan.error is None
    flying = {} if flying is None else flying
    for fetch in plan.cancelled:
        manager.cancelled(flying.pop(fetch.key))
    flying |= {fetch.key: fetch for fetch in plan.prefetches}
    for fetch in (*plan.fetches, *plan.late_fetches, *(flying.pop(key) for key in plan.awaited)):
        manager.arrived(fetch, SLOT if fetch.source is Tier.DISK else 0)
    manager.finish()
    return plan


def land(manager: Manager, flying: dict[ExpertKey, Fetch]) -> None:
    """Everything that was fetched ahead arrives."""
    for fetch in flying.values():
        manager.arrived(fetch, SLOT)
    flying.clear()


def read_prompt(manager: Manager, chunks: Sequence[Sequence[Sequence[int]]], sequence: int = 1) -> list[LayerPlan]:
    """Chunks of layers of token counts; what is fetched ahead has landed when the next layer begins."""
    plans = []
    for step, layers in enumerate(chunks):
        for layer, tokens in enumerate(layers):
            flying: dict[ExpertKey, Fetch] = {}
            plans.append(carry_out(manager, chunk_event(layer, tokens, step, sequence), flying))
            land(manager, flying)
    manager.check_integrity()
    return plans


def held(manager: Manager) -> set[ExpertKey]:
    return set(manager.computing.resident())


FREQUENT = [[1, 2, 9, 8, 3, 1, 2, 1], [9, 1, 1, 2, 3, 8, 2, 1], [2, 8, 1, 1, 9, 1, 3, 2]]
"""Two experts of each of three layers have most of the tokens."""
TOP = {ExpertKey(0, 2), ExpertKey(0, 3), ExpertKey(1, 0), ExpertKey(1, 5), ExpertKey(2, 1), ExpertKey(2, 4)}


def test_a_prompt_leaves_its_most_frequent_experts_of_all_layers() -> None:
    manager = manager_of(3, 8, [6], way="kept")
    read_prompt(manager, [FREQUENT] * 2)
    assert held(manager) == TOP
    scanned = manager_of(3, 8, [6], way="on-demand")
    read_prompt(scanned, [FREQUENT] * 2)
    assert {key.layer for key in held(scanned)} == {2}  # whatever came last


def test_later_chunks_find_what_was_kept_and_a_scan_finds_nothing() -> None:
    kept, scanned = manager_of(3, 8, [6], way="kept"), manager_of(3, 8, [6], way="on-demand")
    for manager in (kept, scanned):
        read_prompt(manager, [FREQUENT] * 3)
    assert kept.stats[Tier.CPU].hits == 2 * 6
    assert scanned.stats[Tier.CPU].hits == 0


@pytest.mark.parametrize("policy", ["lfru", "recall", "s3fifo"])
def test_every_tier_and_every_pool_keeps_them(policy: str) -> None:
    manager = manager_of(3, 8, [3, 9], way="kept", policy=policy, pool="layer")
    read_prompt(manager, [FREQUENT] * 2)
    assert held(manager) == {ExpertKey(0, 2), ExpertKey(1, 0), ExpertKey(2, 4)}
    assert set(manager.caches[1].resident()) == TOP | {ExpertKey(0, 4), ExpertKey(1, 4), ExpertKey(2, 6)}
    manager = manager_of(3, 8, [3, 6], way="kept", policy=policy)
    read_prompt(manager, [FREQUENT] * 2)
    assert held(manager) == {ExpertKey(0, 2), ExpertKey(1, 0), ExpertKey(2, 4)}
    assert set(manager.caches[1].resident()) == TOP


def test_from_the_first_token_of_the_reply_on_the_policy_decides() -> None:
    manager = manager_of(3, 8, [6], way="kept")
    read_prompt(manager, [FREQUENT])
    carry_out(manager, by_hand.event(0, [7], step=1))
    assert ExpertKey(0, 7) in held(manager) and len(held(manager) & TOP) == 5


def test_the_next_prompt_begins_with_what_the_last_one_kept() -> None:
    """Layers that it has not reached yet keep theirs."""
    manager = manager_of(3, 8, [6], way="kept")
    read_prompt(manager, [FREQUENT])
    carry_out(manager, chunk_event(0, [5, 5, 5, 5, 0, 0, 0, 0], sequence=2))
    assert {key for key in TOP if key.layer} <= held(manager)
    manager.clear()
    read_prompt(manager, [FREQUENT])
    assert held(manager) == TOP


def test_the_next_layer_is_begun_before_its_routing_is_known() -> None:
    manager = manager_of(3, 8, [16])
    first, second, third = read_prompt(manager, [FREQUENT])
    assert [fetch.key for fetch in first.prefetches] == [ExpertKey(1, e) for e in range(4)]  # a quarter of the cache
    assert second.resident and not {key.expert for key in second.resident} - {0, 1, 2, 3}
    assert [fetch.key.layer for fetch in second.prefetches] == [2] * 4
    assert third.prefetches == []  # perhaps nothing follows
    counts = manager.stats[Tier.CPU]
    assert (counts.prefetches, counts.useful_prefetches, counts.wasted_prefetches) == (8, 8, 0)


def test_later_chunks_fetch_the_most_frequent_first() -> None:
    manager = manager_of(3, 8, [12])
    read_prompt(manager, [FREQUENT])
    for step in (1, 2):
        plans = read_prompt(manager, [FREQUENT])
        for plan in plans[:-1]:
            layer = plan.event.layer + 1
            tokens = [FREQUENT[layer][fetch.key.expert] for fetch in plan.prefetches]
            assert tokens == sorted(tokens, reverse=True), step
            assert all(fetch.key.layer == layer for fetch in plan.prefetches)
    assert held(manager) >= TOP


def test_no_more_is_begun_than_the_channel_brings_before_the_layer() -> None:
    manager = manager_of(2, 8, [32])
    times = {"seconds": 10.0, "compute_s": 1.0, "stall_s": 1.0, "layers": 2, "experts": 8.0}
    manager.passed(PassTime(Phase.PREFILL, **times, read=8.0, read_s=32.0, copied=0.0, copied_s=0.0))
    first, _ = read_prompt(manager, [FREQUENT[:2]])
    assert len(first.prefetches) == 3  # 4 s of dense part at 4 s a read, and two to begin with


def test_only_layers_that_need_nearly_all_experts_are_streamed() -> None:
    manager = manager_of(2, 8, [16])
    (first, _) = read_prompt(manager, [[[1, 1, 0, 0, 0, 0, 0, 0]] * 2])
    assert not first.prefetches
    manager = manager_of(2, 8, [32])
    (first, _) = read_prompt(manager, [[[3, 3, 3, 3, 3, 3, 0, 0]] * 2])
    assert len(first.prefetches) == 3  # of which, at one in four, less than one is expected to be needless


def test_a_wrong_guess_is_taken_back_or_counted_as_wasted() -> None:
    manager = manager_of(2, 8, [16])
    flying: dict[ExpertKey, Fetch] = {}
    carry_out(manager, chunk_event(0, FREQUENT[0]), flying)
    assert len(flying) == 4
    plan = carry_out(manager, chunk_event(1, [0, 0, 1, 1, 1, 1, 1, 1]), flying)
    assert {fetch.key for fetch in plan.cancelled} == {ExpertKey(1, 0), ExpertKey(1, 1)} and not flying
    assert set(plan.awaited) == {ExpertKey(1, 2), ExpertKey(1, 3)}
    manager.check_integrity()
    counts = manager.stats[Tier.CPU]
    assert (counts.prefetches, counts.late_hits, counts.cancelled_prefetches) == (4, 2, 2)


@pytest.mark.parametrize("seed", range(60))
def test_random_prompts_and_replies_keep_every_cache_in_order(seed: int) -> None:
    """Whatever the shape, and whenever transfers land: nothing over budget, books that add up, the same again."""
    rng = random.Random(seed)
    layers, experts = rng.randint(1, 4), rng.randint(2, 9)
    slots = [rng.randint(1, layers * experts) for _ in range(rng.randint(1, 2))]
    pool = rng.choice(["global", "layer"])
    if pool == "layer":
        slots = [layers * max(n // layers, 1) for n in slots]
    kind: dict[str, Any] = {"policy": rng.choice(["lru", "lfru", "recall(bypass=True)", "sieve"]), "pool": pool}
    manager = manager_of(layers, experts, slots, **kind)
    manager.log = log = []
    flying: dict[ExpertKey, Fetch] = {}
    for sequence in range(4):
        chunks = rng.randint(1, 3)
        for step in range(chunks + rng.randint(0, 3)):
            for layer in range(layers):
                if step < chunks:
                    tokens = [rng.choice([0, 1, 5, 20]) for _ in range(experts)]
                    event = chunk_event(layer, tokens if any(tokens) else [1] * experts, step, sequence)
                else:
                    chosen = rng.sample(range(experts), rng.randint(1, experts))
                    event = by_hand.event(layer, chosen, step)._replace(sequence=sequence)
                for key in rng.sample(list(flying), rng.randint(0, len(flying))):
                    manager.arrived(flying.pop(key), SLOT)
                plan = carry_out(manager, event, flying)
                assert all(manager.computing.state(fetch.key) is not State.MISS for fetch in flying.values())
                assert not plan.prefetches or plan.event.phase is Phase.PREFILL
                for cache in manager.caches:
                    cache.check_integrity()
            manager.passed(PassTime(event.phase, rng.random(), 0.1, 0.1, layers, 5, 3, 0.1, 3, 0.1))
    land(manager, flying)
    manager.check_integrity()
    counts = manager.stats[manager.computing.tier]
    decided = counts.useful_prefetches + counts.wasted_prefetches + counts.cancelled_prefetches
    assert 0 <= counts.prefetches - decided <= slots[0]
    assert all(cache.peak_bytes <= cache.capacity_bytes for cache in manager.caches)
    assert first_difference(log, manager_of(layers, experts, slots, **kind)) is None
