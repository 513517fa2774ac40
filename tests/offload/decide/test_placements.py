"""What lies where before the first token: ranked by each rule, and given places tier by tier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import make_policy
from cache.quota import Quota, make_quota
from cache.residency import ExpertCache
from cache.types import ExpertKey, Tier
from offload.decide.manager import Manager
from offload.decide.placements.base import make_placement, place, placement_names
from offload.decide.stacks import Stacks

K = ExpertKey
LAYERS, EXPERTS = 3, 4
COUNTS = np.array([[5, 0, 9, 1], [0, 0, 7, 7], [2, 0, 0, 8]])


def stacks(*slots: int, pool: str = "global", sizes: tuple[int, ...] = (10,)) -> Stacks:
    """Caches of so many experts in each tier, for each slice."""
    made = []
    tiers = (Tier.GPU, Tier.CPU)[-len(slots) :]
    for size in sizes:
        made.append([])
        for tier, count in zip(tiers, slots, strict=True):
            lanes = Lanes.shared(LAYERS, EXPERTS, count)
            if pool == "layer":
                lanes = Lanes.per_layer(LAYERS, EXPERTS, [count // LAYERS] * LAYERS)
            made[-1].append(ExpertCache(tier, [size * n for n in lanes.slots.tolist()], make_policy("lru", lanes)))
    return Stacks(made, sizes, [tuple(range(len(sizes)))])


def place_at_once(made: Stacks, order: Sequence[ExpertKey], quota: Quota | None = None) -> None:
    for fetch in Manager(made, quota=quota).place(order):
        for tier in fetch.admitted:
            made.cache(tier, fetch.slice).commit(fetch.key)


@pytest.mark.parametrize("name", placement_names())
@pytest.mark.parametrize("counts", [None, COUNTS, np.zeros((LAYERS, EXPERTS), np.int64)])
def test_a_placement_names_each_expert_once_at_most(name: str, counts: np.ndarray | None) -> None:
    order = make_placement(name, LAYERS, EXPERTS).order(counts)
    assert len(set(order)) == len(order)
    assert all(0 <= layer < LAYERS and 0 <= expert < EXPERTS for layer, expert in order)
    assert order == make_placement(name, LAYERS, EXPERTS).order(counts)


def test_the_popular_are_those_that_were_used_most() -> None:
    popular = make_placement("popular", LAYERS, EXPERTS)
    most = [K(0, 2), K(2, 3), K(1, 2), K(1, 3), K(0, 0), K(2, 0), K(0, 3)]
    assert popular.order(COUNTS) == most
    assert popular.order(None) == []


def test_chance_goes_by_its_seed() -> None:
    orders = [make_placement(f"random(seed={seed})", LAYERS, EXPERTS).order(None) for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    with pytest.raises(PolicyError, match='no placement is called "best": choose one of empty, popular, random'):
        make_placement("best", LAYERS, EXPERTS)


def test_the_tier_that_computes_takes_the_first_and_the_next_tier_the_next() -> None:
    order = make_placement("popular", LAYERS, EXPERTS).order(COUNTS)
    made = stacks(3, 2)
    fetches = list(place(made, order))
    assert [(f.key, f.admitted, f.to_host) for f in fetches] == [
        *((key, (Tier.GPU,), False) for key in (K(1, 2), K(2, 3), K(0, 2))),  # the best is the latest
        *((key, (Tier.CPU,), True) for key in (K(0, 0), K(1, 3))),
    ]
    assert made.caches[0].pending() == [fetch.key for fetch in fetches[:3]]
    made.caches[0].check_integrity()


def test_each_layer_takes_as_many_as_its_own_cache_holds() -> None:
    made = stacks(3, pool="layer")
    place_at_once(made, make_placement("popular", LAYERS, EXPERTS).order(COUNTS))
    assert set(made.caches[0].resident()) == {K(0, 2), K(1, 2), K(2, 3)}


def test_layers_share_as_their_quota_says_before_anything_is_placed() -> None:
    made = stacks(6, pool="layer")
    order = make_placement("random", LAYERS, EXPERTS).order(None)
    place_at_once(made, order, make_quota("shallow", LAYERS, EXPERTS))
    assert [sum(key.layer == layer for key in made.caches[0].resident()) for layer in range(LAYERS)] == [4, 1, 1]


def test_all_slices_of_an_expert_have_a_place_or_none() -> None:
    made = stacks(2, sizes=(10, 3))
    made.by_slice[1][0].capacities[0] = 3  # room for one
    place_at_once(made, [K(0, 0), K(0, 1)])
    assert [cache.resident() for cache in made.caches] == [[K(0, 0)], [K(0, 0)]]


def test_what_is_there_stays_and_takes_its_room() -> None:
    made = stacks(2)
    made.caches[0].reserve(K(2, 2), 10)
    made.caches[0].commit(K(2, 2))
    place_at_once(made, [K(2, 2), K(0, 0), K(0, 1)])
    assert set(made.caches[0].resident()) == {K(2, 2), K(0, 0)}
