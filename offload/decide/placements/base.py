"""What a placement is: which experts are in memory before the first token. Torch-free.

A placement only ranks experts. The tier that computes takes the first ones, as many as it has room for, and each tier
behind it the next ones. Whatever moves them does so live and in a replay alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cache.registry import Part, Registry
from cache.residency import ExpertCache, State
from cache.traces.profiles import use_counts
from cache.traces.trace import Trace
from cache.types import ExpertKey, Tier
from offload.decide.plan import Fetch
from offload.decide.stacks import Stacks

EMPTY = "empty"
"""What runs if nobody says."""


class Placement(Part, ABC):
    """Ranks a model's experts for a start."""

    needs_counts: ClassVar[bool] = False
    """Whether it goes by how often each expert was used: in a profile, or by this model before."""

    @abstractmethod
    def order(self, counts: NDArray[np.int64] | None) -> list[ExpertKey]:
        """The experts to place, the most important first. `counts` [L, E] are uses, None if none are known."""


_registry: Registry[Placement] = Registry("placement", Placement, ["offload.decide.placements"])  # type: ignore[type-abstract]
register = _registry.register
placement_names = _registry.names
find_placement = _registry.find


def make_placement(spec: str, num_layers: int, num_experts: int) -> Placement:
    """The placement that `spec` names, such as "popular" or "random(seed=1)". Raises PolicyError."""
    return _registry.make(spec, num_layers, num_experts)


def uses_of(placement: Placement, profile: Trace | None) -> NDArray[np.int64] | None:
    """How often a `profile` used each expert, [L, E], if `placement` goes by that. Raises TraceError for the profile of
    another model."""
    if profile is None or not placement.needs_counts:
        return None
    profile.check_model(placement.num_layers, placement.num_experts)
    return use_counts(profile)


def place(stacks: Stacks, order: Sequence[ExpertKey]) -> Iterator[Fetch]:
    """Reserve a place for each expert of `order`, at its best precision, in the first tier that has room for it; gives
    the fetches that bring it there, every one of which is to be carried out.

    In each tier the least important comes first, so that policies which go by recency keep the most important longest.
    Nothing is evicted.
    """
    left = list(order)
    for index, tier in enumerate(stacks.tiers):
        caches = {slice_: stacks.by_slice[slice_][index] for slice_ in stacks.precisions[0]}
        chosen = _that_fit(left, [(cache, stacks.sizes[slice_]) for slice_, cache in caches.items()])
        for key in reversed(chosen):
            for slice_, cache in caches.items():
                cache.reserve(key, stacks.sizes[slice_])
                yield Fetch(key, Tier.DISK, (tier,), slice=slice_, to_host=tier is not stacks.computing)
        taken = set(chosen)
        left = [key for key in left if key not in taken]


def _that_fit(keys: Sequence[ExpertKey], caches: Sequence[tuple[ExpertCache, int]]) -> list[ExpertKey]:
    """The first of `keys` for which every cache has free room, for so many bytes each."""
    room = [[(c - u) // nbytes for c, u in zip(cache.capacities, cache.used, strict=True)] for cache, nbytes in caches]
    chosen = []
    for key in keys:
        lanes = [(free, cache.lane_of(key.layer)) for free, (cache, _) in zip(room, caches, strict=True)]
        if all(free[lane] for free, lane in lanes) and all(cache.state(key) is State.MISS for cache, _ in caches):
            chosen.append(key)
            for free, lane in lanes:
                free[lane] -= 1
    return chosen
